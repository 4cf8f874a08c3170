"""Bad input ends the start of a real server with one clear line, before a model is loaded; the cases themselves are in
the hook's tests."""

import subprocess
import sys

import pytest

from harness.server_args import write_model
from launcher import server_environment

pytestmark = pytest.mark.server

COMMANDS = {
    "launch_server": ["-m", "sglang.launch_server"],
    "serve": ["-c", "from sglang.cli.main import main; main()", "serve"],
}


@pytest.mark.parametrize(
    "command, flags, environment, message",
    [
        ("launch_server", "--kvtuner-config {preset}", {}, "line 2: nbits_key of layer 0 is 3; valid are 2, 4, 8, 16"),
        ("launch_server", "--kvtuner-residual-length 2000000000", {}, "--kvtuner-residual-length is 2000000000; "),
        ("serve", "--max-total-tokens -1", {}, "--max-total-tokens is -1; "),
        ("serve", "", {"SGLANG_KVTUNER_CPU_ISA": "neon"}, "SGLANG_KVTUNER_CPU_ISA is 'neon'; "),
    ],
)
def test_a_command_line_ends_with_one_line(tmp_path, command, flags, environment, message):
    (tmp_path / "preset.yaml").write_text("0:\n  nbits_key: 3\n  nbits_value: 4\n")
    model = write_model(tmp_path / "model")  # without weights, which nobody gets to miss
    flags = f"--model-path {model} --device cpu --enable-kvtuner-quant {flags}".format(preset=tmp_path / "preset.yaml")
    done = subprocess.run(
        [sys.executable, *COMMANDS[command], *flags.split()],
        env=server_environment(("--device", "cpu"), extra=environment),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith("sglang: error: ") and message in line
