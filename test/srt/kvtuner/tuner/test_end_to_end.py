"""The tuner on a small model with random weights: search and evaluation as a user runs them."""

import json
import math
import subprocess
import sys
import time

import pytest

from harness import fake_quant
from launcher import server_environment
from machine import device_flags
from sglang.srt.kvtuner.config.preset import load_preset
from sglang.srt.kvtuner.config.preset_header import read_header
from sglang.srt.kvtuner.tuner.recipe import average_bits
from sglang.srt.kvtuner.tuner.text import read_source

pytestmark = pytest.mark.server
WINDOW, CHUNK = 256, 128
SEARCH = ("search", "--trials", "6", "--starts", "2", "--population", "2", "--groups", "2")
# A task for lm-eval with a data set of the test's own.
TASK = """
task: capitals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is the city of"
doc_to_choice: cities
doc_to_target: right
metric_list:
  - metric: acc
"""
CAPITALS = dict(
    line.split()
    for line in [
        "France Paris",
        "Japan Tokyo",
        "Italy Rome",
        "Germany Berlin",
        "Spain Madrid",
        "Russia Moscow",
        "China Beijing",
        "Egypt Cairo",
        "Greece Athens",
        "Austria Vienna",
        "Poland Warsaw",
        "Ireland Dublin",
        "Norway Oslo",
        "Cuba Havana",
        "Peru Lima",
        "Portugal Lisbon",
        "Kenya Nairobi",
        "Hungary Budapest",
        "Thailand Bangkok",
        "Iran Tehran",
    ]
)


def tuner(model, out, command, *options):
    """A process of the tuner."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "sglang.srt.kvtuner.tuner", command, "--model-path", str(model), "--out", str(out)),
            *("--windows", "1", "1", "1", "--window", str(WINDOW), "--chunk", str(CHUNK), "--batch", "1", *options),
            *(() if "--" in options else ("--",)),
            *device_flags(),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=server_environment(device_flags()),
    )


def tune(model, out, command, *options):
    process = tuner(model, out, command, *options)
    printed, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return printed


@pytest.fixture(scope="module")
def searched(random_llama, tmp_path_factory):
    """Model, folder and output of a search that nothing interrupted."""
    pytest.importorskip("optuna", reason="the search needs optuna")
    pytest.importorskip("matplotlib", reason="the search plots with matplotlib")
    model, folder = random_llama(), tmp_path_factory.mktemp("searched")
    return model, folder, tune(model, folder, *SEARCH)


def test_search_leaves_presets_tables_and_plots(searched):
    model, folder, printed = searched
    mix = load_preset(str(folder / "best.yaml"))
    assert len(mix) == 4 and average_bits(mix) <= 4.0
    assert read_header(str(folder / "best.yaml"))["model"] == str(model)
    for plot in ("sensitivity.png", "front.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    errors = json.loads((folder / "sensitivity.json").read_text())["attention_output_error"]
    for layer in errors["sym/K-token/V-token/g64"]:
        assert 0 < layer["K8V8"] < layer["K4V8"] < layer["K2V8"] and layer["K8V4"] < layer["K8V2"]
    rows = {row["configuration"]: row for row in json.loads((folder / "evaluation.json").read_text())}
    assert rows["unquantized"]["kl"] == 0 < rows["K8V8"]["kl"] < rows["K8V4"]["kl"] < rows["K4V4"]["kl"]
    assert rows["K4V4"]["stored_bits"] == 4.25
    for name in rows:
        assert f"| {name} " in printed


def test_a_killed_search_ends_like_an_uninterrupted_one(searched, tmp_path):
    model, folder, _ = searched
    journal = tmp_path / "scores.jsonl"
    texts = [json.loads(line).get("text") for line in (folder / "scores.jsonl").read_text().splitlines()]
    for text in ("calibration", "search"):
        process = tuner(model, tmp_path, *SEARCH)
        # Killed with its second score on this text, of many.
        while not journal.exists() or journal.read_bytes().count(b"\n") <= texts.index(text) + 1:
            assert process.poll() is None, process.communicate()[1][-3000:]
            time.sleep(0.005)
        process.kill()
        process.communicate()
        assert journal.read_bytes().count(b"\n") < len(texts)
    tune(model, tmp_path, *SEARCH)
    for name in ("scores.jsonl", "sensitivity.json", "front.json", "front.md", "best.yaml"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


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


def test_a_cache_that_a_batch_does_not_fit_in_is_told(tmp_path, random_llama):
    process = tuner(random_llama(), tmp_path, "evaluate", "--configs", "K4V4", "--", "--max-total-tokens", "192")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "--batch is 1; its windows have 256 tokens" in errors and "leaves the unquantized cache 192" in errors


def test_own_tasks_of_lm_eval(tmp_path, smollm2_checkpoint):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]'")
    data, cities = tmp_path / "capitals.jsonl", list(CAPITALS.values())
    with open(data, "w", encoding="utf-8") as lines:
        for i, (country, capital) in enumerate(CAPITALS.items()):
            choices = [cities[(i + step) % len(cities)] for step in (3, 7, 12)]
            choices.insert(i % 4, capital)
            lines.write(json.dumps({"country": country, "cities": choices, "right": i % 4}) + "\n")
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=data))
    tasks = ("--lm-eval", "capitals", "--include-path", str(tmp_path))
    tune(smollm2_checkpoint, tmp_path, "evaluate", "--configs", "K8V4", *tasks, "--", "--max-total-tokens", "8192")
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())
    # Guessing one of four cities is right 25 % of the time.
    assert list(row["tasks"]) == ["capitals acc"] and row["tasks"]["capitals acc"] > 0.6
