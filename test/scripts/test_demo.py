"""The demo: what it prints, and how it fails."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

import demo
from launcher import ROOT, ServerError

CACHE = {
    "stored_bits_key": 4.5,
    "stored_bits_value": 4.75,
    "stored_bits": 4.625,
    "bytes_per_token": 6660.0,
    "bytes_per_token_full_precision": 23040,
    "pool_bytes": 200 * 2**20,
    "ring_bytes": 56 * 2**20,
    "capacity_tokens": 32768,
    "capacity_tokens_full_precision": 11650,
}


def run_demo(tmp_path, *flags):
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--log", str(tmp_path / "server.log"), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@contextmanager
def serving_demo(tmp_path, *flags):
    """The demo's process once it serves, and what it has printed, the command to try last."""
    command = [
        sys.executable,
        "-u",
        str(ROOT / "scripts" / "demo.py"),
        "--serve",
        "--log",
        str(tmp_path / "server.log"),
    ]
    process = subprocess.Popen(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests in the background of a shell inherit that this signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with process:
        try:
            printed = []
            for line in process.stdout:
                printed.append(line.rstrip())
                if line.startswith("curl "):
                    break
            assert printed and printed[-1].startswith("curl "), "\n".join(printed)
            yield process, printed
        finally:
            process.terminate()  # which ends the server too


class FakeServer:
    """A server that answers at once and ends after it has been looked at a few times."""

    command = ("python",)
    log_path = "log"
    answer = "Paris"

    def __init__(self, model, flags, *, log_path, port):
        self.url = f"http://127.0.0.1:{port}"
        self._looks = 3

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        pass

    def wait_until_healthy(self, progress):
        pass

    def alive(self):
        self._looks -= 1
        return self._looks > 0

    def error(self, message):
        return ServerError(message)

    def request(self, path, payload=None):
        if path == "/server_info":
            return {"internal_states": [{"kvtuner": CACHE}]}
        assert payload["messages"][-1] == {"role": "user", "content": demo.QUESTION}
        return {"choices": [{"message": {"content": self.answer}}], "usage": {"prompt_tokens": 700}}


@pytest.fixture
def run_in_process(tmp_path, monkeypatch):
    """Call with arguments to run the demo with :class:`FakeServer`; returns the exit status."""
    monkeypatch.setattr(demo, "Server", FakeServer)
    monkeypatch.setattr(demo.signal, "signal", lambda *unused: None)
    return lambda *arguments: demo.main(["--model", "m", "--log", str(tmp_path / "log"), "--port", "4321", *arguments])


def test_a_demo_that_answered_ends_well(run_in_process, capsys):
    assert run_in_process() == 0
    printed = capsys.readouterr().out
    assert "A: Paris\n" in printed and "\ncurl " not in printed


def test_an_empty_answer_fails_the_demo(run_in_process, monkeypatch, capsys):
    monkeypatch.setattr(FakeServer, "answer", "")
    assert run_in_process() == 1
    assert "the model's answer is empty" in capsys.readouterr().err


def test_serving_prints_a_command_that_asks_the_server(run_in_process, capsys):
    run_in_process("--serve")
    (command,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("curl ")]
    words = shlex.split(command)
    assert "http://127.0.0.1:4321/v1/chat/completions" in words
    assert json.loads(words[words.index("-d") + 1]) == demo.chat_payload(demo.QUESTION)


def test_the_readme_asks_through_the_chat_template():
    """An instruct model answers that; to the bare text of the question it may say nothing."""
    curls = re.findall(r"curl (\S+) .*?-d '(.*?)'", (ROOT / "README.md").read_text(), re.DOTALL)
    chat, raw = [(url.partition("30000")[2], json.loads(data)) for url, data in curls]
    assert chat == (demo.CHAT, demo.chat_payload(demo.QUESTION))
    assert raw == ("/generate", {"text": demo.QUESTION, "sampling_params": {"temperature": 0}})


def test_the_table_compares_with_full_precision():
    lines = demo.cost_table({"internal_states": [{"kvtuner": CACHE}]}).splitlines()
    cells = {line[:34].strip(): line[34:].split() for line in lines}
    assert cells == {
        "": ["quantized", "bf16"],
        "stored bits per element, keys": ["4.50", "16.00"],
        "stored bits per element, values": ["4.75", "16.00"],
        "stored bits per element, average": ["4.62", "16.00"],
        "KV bytes per token": ["6,660", "23,040"],
        "tokens in 256.0 MiB": ["32,768", "11,650"],
    }


def test_without_the_quantized_cache_only_the_capacity_is_told():
    table = demo.cost_table({"internal_states": [{}], "max_total_num_tokens": 32768})
    assert table == "The quantized cache is off: 32,768 tokens of full-precision KV cache."


@pytest.mark.server
def test_a_server_that_cannot_start_fails_the_demo_with_its_log(tmp_path):
    (tmp_path / "empty").mkdir()
    done = run_demo(tmp_path, "--flag-off", "--model", str(tmp_path / "empty"))
    assert done.returncode == 1
    assert "demo: the server ended with exit status" in done.stderr
    assert "--- last lines of" in done.stderr
    last_line = (tmp_path / "server.log").read_text().splitlines()[-1]
    assert last_line and last_line in done.stderr


@pytest.mark.server
def test_the_demo_answers_and_so_does_the_command_that_it_prints(tmp_path, smollm2_checkpoint):
    with serving_demo(tmp_path, "--model", str(smollm2_checkpoint)) as (demonstration, printed):
        if shutil.which("curl") is None:
            pytest.skip("no curl to run the printed command with")
        reply = subprocess.run(printed[-1], shell=True, capture_output=True, text=True, timeout=120, check=True)
        demonstration.send_signal(signal.SIGINT)
        assert demonstration.wait(60) == 130
    plain, packed = [line for line in printed if line.startswith("A: ")]
    assert "Paris" in plain and "Paris" in packed
    assert "Paris" in json.loads(reply.stdout)["choices"][0]["message"]["content"]
    text = "\n".join(printed)
    assert "448 of them read from packed pages" in text
    # 4 bits, and 16 bits each of scale and zero point for 64 elements.
    assert "stored bits per element, average          4.50" in text
    assert "stored bits per element, keys             4.50" in text
