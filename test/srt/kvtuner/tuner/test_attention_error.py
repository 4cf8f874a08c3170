"""The sensitivity probe against the independent simulation: errors of one layer's attention output."""

from types import SimpleNamespace

import pytest
import torch

from harness.fake_quant import Recipe, attend, packed_lengths
from sglang.srt.kvtuner.config.flags import KVTunerConfig
from sglang.srt.kvtuner.config.preset import LayerBits
from sglang.srt.kvtuner.tuner.attention_error import measure_errors
from sglang.srt.kvtuner.tuner.engine import EngineSettings
from sglang.srt.kvtuner.tuner.recipe import ALL_PAIRS
from sglang.srt.kvtuner.tuner.text import Windows

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 32
SCALING = HEAD_DIM**-0.5
SETTINGS = EngineSettings("a-model", batch=2, window=192, chunk=64, stride=3, page_size=32)


class Engine:
    """One layer whose queries, keys and values are random, with channels of different size."""

    settings, num_layers = SETTINGS, 1

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        shape = (SETTINGS.batch, SETTINGS.window)
        scale = torch.rand(HEAD_DIM, generator=generator) * 3
        self.q, self.k, self.v = (
            torch.randn(*shape, heads, HEAD_DIM, generator=generator) * scale for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

    def probe(self, windows, observe):
        observe(self.q, self.k, self.v, 0, SCALING)


def simulated_error(engine, config, pair):
    """The relative error over scored positions of the second chunk on."""
    recipe = Recipe(
        *(pair.key, pair.value, config.asym, config.axis_key, config.axis_value, config.group_size),
        hadamard_key=config.hadamard_key,
        sinks=config.sink_length,
    )
    s = SETTINGS
    packed = packed_lengths(s.window, chunk=s.chunk, page=s.page_size, residual=config.residual_length)
    q, k, v = (x.transpose(1, 2) for x in (engine.q, engine.k, engine.v))
    rows = torch.arange(s.chunk + s.stride - 1, s.window, s.stride)
    exact, found = (attend(q, k, v, SCALING, r, packed)[:, rows] for r in (None, recipe))
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("sinks", [0, 4, 32])
@pytest.mark.parametrize(
    "recipe",
    [
        dict(group_size=32),
        dict(group_size=16, asym=True, axis_key=1),
        dict(group_size=32, asym=True, axis_value=1, hadamard_key=True, residual_length=40),
    ],
    ids=str,
)
def test_errors_are_those_of_what_the_cache_shows(recipe, sinks):
    engine, config = Engine(), KVTunerConfig(**{"residual_length": 0, **recipe}, sink_length=sinks)
    text = Windows(torch.zeros(SETTINGS.batch, SETTINGS.window, dtype=torch.int64))
    (errors,) = measure_errors(engine, text, (config,))[config]
    assert list(errors) == list(ALL_PAIRS)
    for pair in ALL_PAIRS:
        assert errors[pair] == pytest.approx(simulated_error(engine, config, pair), rel=1e-3), pair
    assert errors[LayerBits(2, 2)] > 0.05


def test_nothing_is_lost_where_all_packed_tokens_are_sinks():
    engine = Engine()
    # Queries of the last chunk see one page quantized, and sinks fill it.
    config = KVTunerConfig(group_size=32, residual_length=96, sink_length=32)
    (errors,) = measure_errors(engine, SimpleNamespace(ids=torch.zeros(2, 192)), (config,))[config]
    assert max(errors.values()) < 1e-6
