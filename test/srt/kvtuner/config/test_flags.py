"""Values of the flags that cannot work are refused by flag."""

from types import SimpleNamespace

import pytest

from sglang.srt.kvtuner.config.flags import FLAG_OF_FIELD, KVTunerConfig, KVTunerConfigError

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
    assert "valid are True, False" in refused(field, value)


@pytest.mark.parametrize("value", (0, -2, -64))
def test_groups_without_elements(value):
    assert "-1 for the whole head_dim" in refused("group_size", value)


@pytest.mark.parametrize("field", ("group_size", "residual_length", "sink_length"))
@pytest.mark.parametrize("value", (None, "64", 64.0, True))
def test_numbers_that_are_no_integers(field, value):
    assert "an integer is needed" in refused(field, value)


@pytest.mark.parametrize("field", ("residual_length", "sink_length"))
@pytest.mark.parametrize("value", (-1, -128))
def test_negative_lengths(field, value):
    assert "0 and above" in refused(field, value)


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
    )
    assert set(given) == set(FLAG_OF_FIELD)
    config = KVTunerConfig.from_args(SimpleNamespace(**given))
    assert config == KVTunerConfig(8, 2, True, 1, 0, 32, 7, 3, True, "preset.yaml")


def test_flags_are_the_fields_with_dashes():
    for field, flag in FLAG_OF_FIELD.items():
        assert flag == "--" + field.replace("_", "-")
