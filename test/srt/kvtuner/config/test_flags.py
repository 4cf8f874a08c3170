"""The flag table: what comes from it, and values that cannot work, which are refused by flag."""

import argparse
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang.srt.kvtuner.config.flags import (
    FLAG_OF_FIELD,
    FLAGS,
    RECIPE_FLAGS,
    SWITCH,
    KVTunerConfig,
    KVTunerConfigError,
    add_recipe_arguments,
    flags_table,
)
from sglang.srt.kvtuner.config.preset import load_preset
from sglang.srt.server_args import ServerArgs

README = Path(__file__).resolve().parents[4] / "README.md"

NAMES = {
    "nbits_key": "--kvtuner-nbits-key",
    "nbits_value": "--kvtuner-nbits-value",
    "asym": "--kvtuner-asym",
    "sink_length": "--kvtuner-sink-length",
    "hadamard_key": "--kvtuner-hadamard-key",
    "axis_key": "--kvtuner-axis-key",
    "axis_value": "--kvtuner-axis-value",
    "group_size": "--kvtuner-q-group-size",
    "residual_length": "--kvtuner-residual-length",
    "workspace_tokens": "--kvtuner-workspace-tokens",
}


def refused(field, value, **others):
    with pytest.raises(KVTunerConfigError) as caught:
        KVTunerConfig(**{field: value}, **others)
    message = str(caught.value)
    assert message.startswith(f"{NAMES[field]} is {value!r}"), message
    return message


@pytest.mark.parametrize("field", ("nbits_key", "nbits_value"))
@pytest.mark.parametrize("value", (0, 1, 3, 5, 6, 7, 15, 32, -4, None, "4", 4.0, True))
def test_bits_other_than_2_4_8_16(field, value):
    assert "valid are 2, 4, 8, 16" in refused(field, value)


@pytest.mark.parametrize("field", ("axis_key", "axis_value"))
@pytest.mark.parametrize("value", (2, -1, -2, None, "0", True, False, 1.0))
def test_axis_other_than_0_1(field, value):
    assert "valid are 0, 1" in refused(field, value)


@pytest.mark.parametrize("field", ("asym", "hadamard_key"))
@pytest.mark.parametrize("value", ("yes", "true", 1, 0, None))
def test_switches_that_are_no_bool(field, value):
    assert "valid are true, false" in refused(field, value)


@pytest.mark.parametrize("value", (0, -2, -64))
def test_groups_without_elements(value):
    assert "-1 for the whole head_dim" in refused("group_size", value)


@pytest.mark.parametrize("field", ("group_size", "residual_length", "sink_length", "workspace_tokens"))
@pytest.mark.parametrize("value", (None, "64", 64.0, True))
def test_numbers_that_are_no_integers(field, value):
    assert "; valid are " in refused(field, value)


@pytest.mark.parametrize("field", ("residual_length", "sink_length"))
@pytest.mark.parametrize("value", (-1, -128))
def test_negative_lengths(field, value):
    assert "integers from 0 to " in refused(field, value)


@pytest.mark.parametrize("value", (-1, 0, 1023, 131_073))
def test_workspaces_that_are_too_small_or_too_large(value):
    assert "valid are integers from 1024 to 131072" in refused("workspace_tokens", value)


@pytest.mark.parametrize("axis", ("axis_key", "axis_value"))
def test_group_of_minus_one_needs_axis_0(axis):
    assert f"with {NAMES[axis]} 1" in refused("group_size", -1, **{axis: 1})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"nbits_key": 8, "nbits_value": 2, "asym": True},
        {"nbits_key": 16, "nbits_value": 4},
        {"axis_key": 1, "axis_value": 1, "group_size": 32},
        {"group_size": -1, "residual_length": 0},
        {"residual_length": 100_000},
        {"sink_length": 4},
        {"workspace_tokens": 1024},
        {"workspace_tokens": 131_072},
    ],
)
def test_values_that_work(fields):
    config = KVTunerConfig(**fields)
    assert {name: getattr(config, name) for name in fields} == fields


def test_from_args_reads_every_flag():
    """Each field comes from the argument of its own name."""
    given = dict(
        kvtuner_nbits_key=8,
        kvtuner_nbits_value=2,
        kvtuner_asym=True,
        kvtuner_axis_key=1,
        kvtuner_axis_value=0,
        kvtuner_q_group_size=32,
        kvtuner_residual_length=7,
        kvtuner_sink_length=3,
        kvtuner_hadamard_key=True,
        kvtuner_config="preset.yaml",
        kvtuner_workspace_tokens=2048,
    )
    assert set(given) == set(FLAG_OF_FIELD)
    config = KVTunerConfig.from_args(SimpleNamespace(**given))
    assert config == KVTunerConfig(8, 2, True, 1, 0, 32, 7, 3, True, "preset.yaml", 2048)


@pytest.mark.parametrize("field", sorted(NAMES))
@pytest.mark.parametrize(
    "value",
    (10**5000, -(10**5000), 2**31, -(2**31), "9" * 5000, [4], {"bits": 4}, float("nan")),
    ids=lambda value: type(value).__name__,
)
def test_any_other_value(field, value):
    """Also integers that Python does not print."""
    with pytest.raises(KVTunerConfigError) as caught:
        KVTunerConfig(**{field: value})
    assert str(caught.value).startswith(f"{NAMES[field]} is ") and len(str(caught.value)) < 500


def test_a_string_is_called_one():
    assert refused("nbits_key", "4") == "--kvtuner-nbits-key is '4', a string; valid are 2, 4, 8, 16"
    assert refused("asym", "true") == "--kvtuner-asym is 'true', a string; valid are true, false"


@pytest.mark.parametrize("value", (5, 0, True, b"preset.yaml", Path("preset.yaml"), ["preset.yaml"]))
def test_a_preset_that_is_no_path(value):
    """An integer would be a descriptor of this process."""
    with pytest.raises(KVTunerConfigError, match=r"--kvtuner-config is .*; valid are paths of a YAML file"):
        KVTunerConfig(preset=value)


@pytest.mark.parametrize("value", ("true", "false", "", 1, 0, None))
def test_the_switch_is_a_bool(value):
    with pytest.raises(KVTunerConfigError, match=r"--enable-kvtuner-quant is .*; valid are true, false"):
        SWITCH.check(value)
    SWITCH.check(True), SWITCH.check(False)


def test_every_field_of_the_config_is_a_flag_of_the_server():
    assert [flag.attribute for flag in FLAGS] == [field.name for field in fields(KVTunerConfig)]
    args = ServerArgs(model_path="model")
    assert {flag.field: flag.default for flag in (SWITCH, *FLAGS)} == {
        name: getattr(args, name) for name in args.__struct_fields__ if "kvtuner" in name
    }


def test_the_tuner_has_the_flags_of_a_recipe():
    parser = argparse.ArgumentParser()
    add_recipe_arguments(parser, residual_length=7)
    assert {action.dest for action in parser._actions} - {"help"} == {flag.field for flag in RECIPE_FLAGS}
    assert KVTunerConfig.from_args(parser.parse_args([]), RECIPE_FLAGS) == KVTunerConfig(residual_length=7)
    options = parser.parse_args(["--kvtuner-asym", "--kvtuner-axis-key", "1", "--kvtuner-sink-length", "4"])
    expected = KVTunerConfig(asym=True, axis_key=1, sink_length=4, residual_length=7)
    assert KVTunerConfig.from_args(options, RECIPE_FLAGS) == expected
    assert "(default: 7)" in parser.format_help() and "(default: false)" in parser.format_help()


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.layered], ids=lambda flag: flag.attribute)
def test_layers_of_a_preset_may_say_it(flag, tmp_path):
    value = {"hadamard_key": "true", "sink_length": "4"}.get(flag.attribute, "2")
    options = {"nbits_key": "8", "nbits_value": "8", flag.attribute: value}
    path = tmp_path / "preset.yaml"
    path.write_text("0: {" + ", ".join(f"{name}: {text}" for name, text in options.items()) + "}\n")
    (layer,) = load_preset(str(path))
    said = {"nbits_key": layer.key, "nbits_value": layer.value}
    assert str(said.get(flag.attribute, getattr(layer, flag.attribute, None))).lower() == value


def test_the_table_of_the_readme():
    """``python -m sglang.srt.kvtuner.config.flags`` prints what belongs there."""
    assert flags_table() in README.read_text(encoding="utf-8")
    command = [sys.executable, "-m", "sglang.srt.kvtuner.config.flags"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == flags_table()


def test_flags_are_the_fields_with_dashes():
    for field, flag in FLAG_OF_FIELD.items():
        assert flag == "--" + field.replace("_", "-")
