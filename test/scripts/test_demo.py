"""The demo: what it prints, and how it fails."""

import subprocess
import sys

import pytest

import demo
from launcher import ROOT

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
def test_the_demo_answers(tmp_path, smollm2_checkpoint):
    done = run_demo(tmp_path, "--model", str(smollm2_checkpoint))
    assert done.returncode == 0, done.stderr
    plain, packed = [line for line in done.stdout.splitlines() if line.startswith("A: ")]
    assert "Paris" in plain and "Paris" in packed
    assert "448 of them read from packed pages" in done.stdout
    # 4 bits, and 16 bits each of scale and zero point for 64 elements.
    assert "stored bits per element, average          4.50" in done.stdout
    assert "stored bits per element, keys             4.50" in done.stdout
