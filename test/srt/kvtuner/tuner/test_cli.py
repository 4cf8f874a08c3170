"""The command line: what is refused before a model is loaded, and how."""

import pytest

from sglang.cli.main import main as upstream_main
from sglang.srt.kvtuner.config.flags import KVTunerConfig, KVTunerConfigError
from sglang.srt.kvtuner.config.identity import identity
from sglang.srt.kvtuner.tuner.cli import main
from sglang.srt.kvtuner.tuner.errors import TuningError
from sglang.srt.kvtuner.tuner.evaluate import parse_configuration
from sglang.srt.kvtuner.tuner.outputs import text_table
from sglang.srt.kvtuner.tuner.recipe import parse_recipe, recipe_name
from sglang.srt.kvtuner.tuner.served import recall_items
from sglang.version import __version__


def refusal(capsys, *arguments):
    assert main([*arguments, "--model-path", "no-such-model"]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"sglang kvtuner {arguments[0]}: ")
    return message


def test_the_version_is_a_command(capsys, monkeypatch):
    """By upstream's own entry point, as it is typed."""
    monkeypatch.setattr("sys.argv", ["sglang", "kvtuner", "version"])
    with pytest.raises(SystemExit) as ended:
        upstream_main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{identity().describe()}\n"
    assert identity().version == __version__


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("--window", "500"), "--window is 500; valid are multiples of --chunk 128 from 256 on"),
        (("--window", "128"), "--window is 128; valid are multiples"),
        (("--chunk", "100"), "--chunk is 100; valid are multiples of --page-size 64"),
        (("--stride", "0"), "--stride is 0; valid are 1 to --chunk 128"),
        (("--batch", "0"), "--batch is 0; valid are 1 and above"),
        (("--windows", "2", "0", "1"), "--windows is 2 0 1; valid are three counts from 1 on"),
        (("--kvtuner-axis-key", "2"), "--kvtuner-axis-key is 2; valid are 0, 1"),
        (("--text", "/no/such/file.txt"), "--text /no/such/file.txt: no such file"),
        (("--eval-text", "/no/such/file.txt"), "--eval-text /no/such/file.txt: no such file"),
    ],
)
def test_impossible_settings_are_named(capsys, monkeypatch, arguments, problem):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert problem in refusal(capsys, "evaluate", "--configs", "K8V8", *arguments)


@pytest.mark.parametrize(
    "flags, problem",
    [
        (("--page-size", "32"), "--page-size is 32 after -- and 64 before; give it before -- alone"),
        (("--model-path", "other"), "--model-path is other after -- and no-such-model before; give it before -- alone"),
        (("--enable-kvtuner-quant",), "--enable-kvtuner-quant stands after --; the tuner turns the cache on itself"),
        (
            ("--enable-kvtuner-quant", "--kvtuner-asym"),
            "--enable-kvtuner-quant stands after --; the tuner turns the cache on itself",
        ),
    ],
)
def test_server_flags_that_contradict_the_tuner_are_named(capsys, flags, problem):
    command = ("evaluate", "--configs", "K8V8", "--model-path", "no-such-model", "--", "--device", "cpu", *flags)
    assert main([*command]) == 1
    assert problem in capsys.readouterr().err.strip().splitlines()[-1]


def test_search_settings_are_named(capsys):
    pytest.importorskip("optuna", reason="the search needs optuna")
    pytest.importorskip("matplotlib", reason="the search plots with matplotlib")
    assert "--trials is 0; valid are 1 and above" in refusal(capsys, "search", "--trials", "0")


def test_a_missing_package_is_told_with_the_command_that_installs_it(capsys, monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("importlib.import_module", missing)
    assert "pip install optuna matplotlib" in refusal(capsys, "search")


BASE = KVTunerConfig(residual_length=0)
SHAPE = dict(num_layers=3, head_dim=64, page_size=64)


def bits_of(row):
    return [(layer.key.nbits, layer.value.nbits) for layer in row.cache_format.layers]


def test_configurations_become_server_flags():
    row = parse_configuration("asym/K-channel/V-token/g32:K8V4", BASE, **SHAPE)
    assert bits_of(row) == [(8, 4)] * 3
    assert " ".join(row.flags) == (
        "--enable-kvtuner-quant --kvtuner-nbits-key 8 --kvtuner-nbits-value 4 --kvtuner-asym true --kvtuner-axis-key 1 "
        "--kvtuner-axis-value 0 --kvtuner-q-group-size 32 --kvtuner-residual-length 0 --page-size 64"
    )
    assert parse_configuration("unquantized", BASE, **SHAPE).flags == []
    assert bits_of(parse_configuration("K16V4", BASE, **SHAPE)) == [(16, 4)] * 3
    rotated = parse_configuration("sym/K-token-rotated/V-token/g64:K4V4", KVTunerConfig(sink_length=4), **SHAPE)
    assert " ".join(rotated.flags).endswith(
        "--kvtuner-hadamard-key true --kvtuner-sink-length 4 --kvtuner-residual-length 128 --page-size 64"
    )


@pytest.mark.parametrize(
    "config",
    [BASE, KVTunerConfig(asym=True, axis_key=1, group_size=32), KVTunerConfig(group_size=-1, hadamard_key=True)],
)
def test_recipes_are_known_by_their_names(config):
    found = parse_recipe(recipe_name(config), config)
    assert found == config


@pytest.mark.parametrize(
    "spec, problem", [("K3V4", "'K3V4' is no pair of bits; valid are K2V2"), ("x:K4V4", "'x' is no recipe")]
)
def test_unknown_configurations_are_refused(spec, problem):
    with pytest.raises(TuningError, match=problem):
        parse_configuration(spec, BASE, **SHAPE)


def test_a_preset_of_another_layer_count_is_refused(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text("0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 8, nbits_value: 4}\n")
    with pytest.raises(KVTunerConfigError, match="the preset has 2 layers, the model has 3"):
        parse_configuration(str(path), BASE, **SHAPE)
    row = parse_configuration(str(path), BASE, **{**SHAPE, "num_layers": 2})
    assert bits_of(row) == [(8, 4)] * 2 and row.flags[1:3] == ["--kvtuner-config", str(path)]


def test_a_configuration_is_served_with_pages_of_the_size_that_it_was_scored_with():
    row = parse_configuration("K8V4", BASE, **{**SHAPE, "page_size": 32})
    assert row.flags[-2:] == ["--page-size", "32"]


def test_recall_items_hold_their_answer_once():
    for prompt, answer in recall_items(5, seed=1):
        name = prompt.rpartition("\n")[2]
        assert f"\n{name} {answer}\n" in prompt and len(answer) == 4
    assert recall_items(3, seed=1) == recall_items(3, seed=1) != recall_items(3, seed=2)


def test_tables_are_aligned():
    assert text_table(("a", "bb"), [("ccc", "1")]) == "| a   | bb |\n| --- | -: |\n| ccc |  1 |\n"
