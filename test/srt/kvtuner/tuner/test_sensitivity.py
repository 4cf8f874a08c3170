"""The sensitivity probe against the independent simulation, and the recipes that it is asked for."""

import pytest
import torch

from harness.fake_quant import Recipe, attend, packed_lengths
from sglang.srt.kvtuner.config.flags import KVTunerConfig, KVTunerConfigError
from sglang.srt.kvtuner.config.preset import LayerBits
from sglang.srt.kvtuner.tuner import sensitivity
from sglang.srt.kvtuner.tuner.attention_error import measure_errors
from sglang.srt.kvtuner.tuner.engine import EngineSettings
from sglang.srt.kvtuner.tuner.recipe import ALL_PAIRS, recipe_name
from sglang.srt.kvtuner.tuner.run import TuningRun
from sglang.srt.kvtuner.tuner.text import TextSplit, Windows

HEADS, KV_HEADS = 6, 2
SCALING = 0.2
SETTINGS = EngineSettings("a-model", batch=2, window=192, chunk=64, stride=3, page_size=32)
TEXT = Windows(torch.zeros(SETTINGS.batch, SETTINGS.window, dtype=torch.int64))


class Engine:
    """One layer whose queries, keys and values are random, with channels of different size."""

    settings, num_layers = SETTINGS, 1

    def __init__(self, head_dim=32):
        self.head_dim = head_dim
        generator = torch.Generator().manual_seed(0)
        shape = (SETTINGS.batch, SETTINGS.window)
        scale = torch.rand(head_dim, generator=generator) * 3
        self.q, self.k, self.v = (
            torch.randn(*shape, heads, head_dim, generator=generator) * scale for heads in (HEADS, KV_HEADS, KV_HEADS)
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
    (errors,) = measure_errors(engine, TEXT, (config,))[config]
    assert list(errors) == list(ALL_PAIRS)
    for pair in ALL_PAIRS:
        assert errors[pair] == pytest.approx(simulated_error(engine, config, pair), rel=1e-3), pair
    assert errors[LayerBits(2, 2)] > 0.05


def test_nothing_is_lost_where_all_packed_tokens_are_sinks():
    engine = Engine()
    # Queries of the last chunk see one page quantized, and sinks fill it.
    config = KVTunerConfig(group_size=32, residual_length=96, sink_length=32)
    (errors,) = measure_errors(engine, TEXT, (config,))[config]
    assert max(errors.values()) < 1e-6


def run_of(folder, head_dim, **recipe):
    return TuningRun(Engine(head_dim), KVTunerConfig(residual_length=0, **recipe), TextSplit(TEXT, TEXT, TEXT), folder)


@pytest.mark.parametrize(
    "head_dim, recipe, accepted",
    [
        (48, dict(axis_key=1, axis_value=1, group_size=32), "K-channel/V-channel/g32"),  # 32 does not divide a head
        (64, dict(group_size=64), "K-token/V-token/g64"),  # a page has 32 tokens
        (32, dict(group_size=-1), "K-token/V-token/gall"),
    ],
)
def test_recipes_that_no_server_accepts_are_left_out_by_name(tmp_path, capsys, head_dim, recipe, accepted):
    run = run_of(tmp_path, head_dim, **recipe)
    errors = sensitivity.attention_errors(run, sensitivity.all_recipes(run))
    assert [recipe_name(found) for found in errors] == [f"sym/{accepted}", f"asym/{accepted}"]
    axes = [f"K-{key}/V-{value}" for key in ("token", "channel") for value in ("token", "channel")]
    left_out = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    for name in (
        f"{symmetry}/{pair}/" for symmetry in ("sym", "asym") for pair in axes if not accepted.startswith(pair)
    ):
        assert any(f"recipe {name}" in line and "--kvtuner-q-group-size is" in line for line in left_out), name
    assert len(left_out) == 6


def test_all_recipes_of_a_size_that_fits_are_measured(tmp_path, capsys):
    run = run_of(tmp_path, 32, group_size=32, sink_length=4)
    recipes = sensitivity.all_recipes(run)
    assert recipes[0] == run.config and len({recipe_name(recipe) for recipe in recipes}) == 8
    assert capsys.readouterr().err == ""


def test_a_recipe_of_ones_own_that_no_server_accepts_is_refused_before_anything_is_measured(tmp_path, capsys):
    run = run_of(tmp_path, 64, group_size=64, axis_key=1)
    with pytest.raises(KVTunerConfigError, match="--kvtuner-q-group-size is 64 with --kvtuner-axis-key 1"):
        sensitivity.measure(run, (run.config,))
    assert capsys.readouterr().err == "" and list(tmp_path.iterdir()) == []
