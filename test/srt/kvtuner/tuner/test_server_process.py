"""Starting, watching and ending a server process, with a stand-in for the real one."""

import subprocess
import sys
import time

import psutil
import pytest

import launcher
from launcher import ROOT
from sglang.srt.kvtuner.tuner.server_process import Server, ServerError, server_environment

# Starts a child that ignores SIGTERM, says its process id, and serves: /health, an error, and what it was sent.
STAND_IN = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("child", child.pid, flush=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404, b'"no such thing"')

    def do_POST(self):
        self.answer(200, self.rfile.read(int(self.headers["Content-Length"])))

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def stand_in(tmp_path, source=STAND_IN):
    server = Server("model", log_path=tmp_path / "server.log")
    server.command = [sys.executable, "-c", source, str(server.port)]
    return server


def child_of(server):
    return int(server.log_text().split()[1])


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_server_answers_and_ends_with_its_children(tmp_path):
    with stand_in(tmp_path) as server:
        server.wait_until_healthy(60)
        assert server.request("/echo", {"a": [1]}) == {"a": [1]}
        child = child_of(server)
        assert not gone(child)
    assert not server.alive()
    assert gone(child)
    server.stop()


def test_children_of_a_dead_server_are_ended(tmp_path):
    with stand_in(tmp_path) as server:
        server.wait_until_healthy(60)
        child = child_of(server)
        server._process.kill()
        server._process.wait()
    assert gone(child)


def test_an_http_error_shows_the_answer_and_the_log(tmp_path):
    with stand_in(tmp_path) as server:
        server.wait_until_healthy(60)
        with pytest.raises(ServerError, match="(?s)HTTP status 404: .no such thing.*last lines of.*child"):
            server.request("/nothing")


@pytest.mark.parametrize("ending, how", [("sys.exit(3)", "exit status 3"), ("os.kill(os.getpid(), 9)", "signal 9")])
def test_an_early_end_is_told_with_the_log(tmp_path, ending, how):
    with stand_in(tmp_path, f"import os, sys; print('cannot go on', flush=True); {ending}") as server:
        with pytest.raises(ServerError, match=f"(?s)the server ended with {how} .*cannot go on"):
            server.wait_until_healthy(600)


def test_a_server_that_never_answers_is_given_up(tmp_path):
    with stand_in(tmp_path, "import time; time.sleep(600)") as server:
        with pytest.raises(ServerError, match="did not answer within 0 s"):
            server.wait_until_healthy(0.3)


def test_a_server_ends_with_a_killed_caller(tmp_path):
    caller = f"""
import sys, time
sys.path[:0] = [{str(ROOT / "scripts")!r}]
from launcher import Server
server = Server("model", log_path={str(tmp_path / "server.log")!r})
server.command = [sys.executable, "-c", "import time; time.sleep(600)"]
print(server.start()._process.pid, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.PIPE, text=True)
    server_pid = int(process.stdout.readline())
    assert not gone(server_pid)
    process.kill()
    process.wait()
    process.stdout.close()
    for _ in range(100):
        if gone(server_pid):
            break
        time.sleep(0.1)
    assert gone(server_pid)


def test_variables_given_win_and_none_removes(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("UNWANTED", "1")
    environment = server_environment(extra={"OMP_NUM_THREADS": 3, "UNWANTED": None})
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "UNWANTED" not in environment


@pytest.mark.parametrize(
    "flags, on_cpu",
    [
        (("--device", "cpu"), True),
        (("--device=cpu", "--tp-size", "2"), True),
        (("--device", "cpu", "--device", "cuda"), False),
        (("--tp-size", "2"), False),
    ],
)
def test_the_environment_follows_the_device(monkeypatch, flags, on_cpu):
    names = ("SGLANG_USE_CPU_ENGINE", "SGLANG_CPU_OMP_THREADS_BIND")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    environment = server_environment(flags, ranks=2)
    assert [name in environment for name in names] == [on_cpu] * 2


def test_scripts_load_the_launcher_without_the_package():
    code = "import sys, launcher; print(sorted({'sglang', 'torch'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_scripts_and_package_share_one_launcher():
    assert launcher.Server is Server and launcher.ServerError is ServerError
