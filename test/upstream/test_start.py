"""Starting a composed tree once."""

import subprocess
import sys

import pytest

from backend import wheel
from backend.pin import ROOT

START = ROOT / "python/upstream/start.py"


def start(tree):
    return subprocess.run([sys.executable, str(START), str(tree)], capture_output=True, text=True)


def test_an_environment_that_lacks_requirements_is_told_and_nothing_is_tried(tmp_path):
    info = tmp_path / "sglang-1.2.3.dist-info"
    info.mkdir()
    required = ("packaging", "torch>=99", "no-such-thing==1; extra == 'all'", "neither-this==2")
    lines = "".join(f"Requires-Dist: {text}\n" for text in required)
    (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: sglang\nVersion: 1.2.3\n{lines}")
    result = start(tmp_path)
    assert result.returncode == 3, result.stderr
    assert result.stdout.startswith("this environment lacks torch>=99 (here: ")
    assert "neither-this==2 (here: none)" in result.stdout and "no-such-thing" not in result.stdout
    assert "packaging" not in result.stdout


def test_arguments_that_do_not_resolve_are_a_failure(tmp_path):
    info = tmp_path / "sglang-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: sglang\nVersion: 1.2.3\n")
    (tmp_path / "sglang/srt").mkdir(parents=True)
    for name in ("sglang/__init__.py", "sglang/srt/__init__.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "sglang/srt/server_args.py").write_text("raise AttributeError('no enable_lora')\n")
    result = start(tmp_path)
    assert result.returncode == 1 and "AttributeError: no enable_lora" in result.stdout


@pytest.mark.server
def test_the_composed_tree_starts(built, tmp_path):
    wheel.unpack(built, tmp_path)
    result = start(tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resolved: " in result.stdout and "served: 8 tokens from a cache of 5 bits per element" in result.stdout
