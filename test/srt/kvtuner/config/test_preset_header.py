"""What a preset's header says, and the warning when it was made for another model or recipe."""

import logging

import pytest

from sglang.srt.kvtuner.config.flags import KVTunerConfig
from sglang.srt.kvtuner.config.preset import LayerBits, load_preset
from sglang.srt.kvtuner.config.preset_header import model_name, preset_recipe, read_header, warn_of_mismatch
from sglang.srt.kvtuner.tuner.outputs import write_preset

MIX = (LayerBits(8, 4), LayerBits(2, 2, hadamard_key=True), LayerBits(4, 4, sink_length=4))


@pytest.fixture
def preset(tmp_path):
    def write(**header):
        write_preset(tmp_path / "preset.yaml", MIX, header)
        return KVTunerConfig(preset=str(tmp_path / "preset.yaml"))

    return write


def test_header_and_bits_come_back(preset):
    config = preset(model="org/Name-1B", recipe="--some flags", quality="KL 0.1: two\nlines")
    assert load_preset(config.preset) == MIX
    expected = {"model": "org/Name-1B", "recipe": "--some flags", "quality": "KL 0.1: two lines"}
    assert read_header(config.preset) == expected


@pytest.mark.parametrize(
    "path, name",
    [
        ("org/Name-1B", "Name-1B"),
        ("/checkpoints/Name-1B/", "Name-1B"),
        ("/cache/models--org--Name-1B/snapshots/0123abcd", "Name-1B"),
    ],
)
def test_the_name_of_a_model(path, name):
    assert model_name(path) == name


def warnings(caplog, config, model, page_size=64):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="sglang.srt.kvtuner.config.preset_header"):
        warn_of_mismatch(config, model, page_size)
    return caplog.messages


def test_another_model_is_named_beside_the_own(preset, caplog):
    config = preset(model="org/Other-1B")
    (message,) = warnings(caplog, config, "/checkpoints/Mine-1B")
    assert "org/Other-1B" in message and "/checkpoints/Mine-1B" in message and config.preset in message


def test_another_recipe_is_told(preset, caplog):
    config = preset(model="Mine", recipe=preset_recipe(KVTunerConfig(asym=True), 64))
    (message,) = warnings(caplog, config, "Mine")
    assert "--kvtuner-asym true" in message and "--kvtuner-asym false" in message


@pytest.mark.parametrize("tuned, served", [(64, 32), (32, 64), (32, 128)])
def test_another_page_size_is_told(preset, caplog, tuned, served):
    config = preset(model="Mine", recipe=preset_recipe(KVTunerConfig(), tuned))
    assert warnings(caplog, config, "Mine", tuned) == []
    (message,) = warnings(caplog, config, "Mine", served)
    for size in (tuned, served):
        assert (f"--page-size {size}" in message) == (size != 64)


def test_what_fits_or_says_nothing_is_silent(preset, caplog):
    assert (
        warnings(caplog, preset(model="org/Mine", recipe=preset_recipe(KVTunerConfig(), 64)), "/somewhere/mine") == []
    )
    assert warnings(caplog, preset(), "Mine") == []
    assert warnings(caplog, KVTunerConfig(), "Mine") == []
