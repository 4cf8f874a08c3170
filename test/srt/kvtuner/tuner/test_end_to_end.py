"""The tuner on a small model with random weights: search and evaluation as a user runs them."""

import json
import math
import subprocess
import sys

import pytest
from harness import fake_quant
from serverctl import device_flags, server_environment

from sglang.srt.kvtuner.preset import load_preset
from sglang.srt.kvtuner.preset_header import read_header
from sglang.srt.kvtuner.tuner.recipe import average_bits
from sglang.srt.kvtuner.tuner.text import read_source

pytestmark = pytest.mark.server
WINDOW, CHUNK = 256, 128


def tune(model, out, command, *options):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sglang.srt.kvtuner.tuner", command, "--model-path", str(model), "--out", str(out)),
            *("--windows", "1", "1", "1", "--window", str(WINDOW), "--chunk", str(CHUNK), "--batch", "1", *options),
            *(() if "--" in options else ("--",)),
            *device_flags(),
        ],
        capture_output=True,
        text=True,
        env=server_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_search_leaves_presets_tables_and_plots(tmp_path, random_llama):
    pytest.importorskip("optuna", reason="the search needs optuna")
    pytest.importorskip("matplotlib", reason="the search plots with matplotlib")
    model = random_llama()
    printed = tune(model, tmp_path, "search", "--trials", "6", "--starts", "2", "--population", "2", "--groups", "2")
    mix = load_preset(str(tmp_path / "best.yaml"))
    assert len(mix) == 4 and average_bits(mix) <= 4.0
    assert read_header(str(tmp_path / "best.yaml"))["model"] == str(model)
    for plot in ("sensitivity.png", "front.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    errors = json.loads((tmp_path / "sensitivity.json").read_text())["attention_output_error"]
    for layer in errors["sym/K-token/V-token/g64"]:
        assert 0 < layer["K8V8"] < layer["K4V8"] < layer["K2V8"] and layer["K8V4"] < layer["K8V2"]
    rows = {row["configuration"]: row for row in json.loads((tmp_path / "evaluation.json").read_text())}
    assert rows["unquantized"]["kl"] == 0 < rows["K8V8"]["kl"] < rows["K8V4"]["kl"] < rows["K4V4"]["kl"]
    assert rows["K4V4"]["stored_bits"] == 4.25
    for name in rows:
        assert f"| {name} " in printed


def test_figures_are_those_of_an_independent_simulation(tmp_path, smollm2_checkpoint):
    model, recipe = smollm2_checkpoint, fake_quant.Recipe(4, 4)
    tune(model, tmp_path, "evaluate", "--stride", "1", "--configs", "unquantized", "K4V4", "--", "--dtype", "float32")
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model).encode(read_source("--text", "builtin"), add_special_tokens=False)
    final = ids[2 * WINDOW : 3 * WINDOW]
    expected = [fake_quant.window_logprobs(model, [final], r, CHUNK)[0, CHUNK:] for r in (None, recipe)]
    for row, logprobs in zip(rows, expected, strict=True):
        assert math.log(row["perplexity"]) == pytest.approx(-float(logprobs.mean()), abs=5e-4)
    # What quantization changes is an order of magnitude above the tolerance.
    assert abs(float((expected[0] - expected[1]).mean())) > 2e-2
