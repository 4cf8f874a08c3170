"""The search loop with a made-up quality: start points, the cap, determinism, interruption."""

import itertools
from types import SimpleNamespace

import pytest

from sglang.srt.kvtuner.config.flags import KVTunerConfig
from sglang.srt.kvtuner.config.preset import LayerBits, load_preset
from sglang.srt.kvtuner.config.preset_header import read_header
from sglang.srt.kvtuner.tuner import search as search_module
from sglang.srt.kvtuner.tuner.engine import EngineSettings
from sglang.srt.kvtuner.tuner.errors import TuningError
from sglang.srt.kvtuner.tuner.pareto import LayerGroup, mix_of
from sglang.srt.kvtuner.tuner.recipe import ALL_PAIRS, average_bits
from sglang.srt.kvtuner.tuner.run import TuningRun
from sglang.srt.kvtuner.tuner.score import Quality
from sglang.srt.kvtuner.tuner.search import SearchSettings, search
from sglang.srt.kvtuner.tuner.starts import additive_optima, spread

pytest.importorskip("optuna", reason="the search needs optuna")
pytest.importorskip("matplotlib", reason="the search plots with matplotlib")

LAYERS = 6
FRONT = tuple(LayerBits(*pair) for pair in ((2, 2), (4, 2), (4, 4), (8, 4), (8, 8)))
SETTINGS = SearchSettings(max_bits=4.0, groups=LAYERS, trials=25, population=6, starts=4, seed=3)


def loss(mix):
    return sum((i + 1) * 2.0**-pair.key + 2.0 ** -(pair.value + 1) for i, pair in enumerate(mix)) + (
        0.01 * sum(a != b for a, b in itertools.pairwise(mix))
    )


class Texts:
    """Stands for a text split; only digests are asked for."""

    calibration = search = final = SimpleNamespace(digest=lambda: "digest")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Call with a folder's name, and after how many scores to be interrupted; returns front and number of scores."""
    errors = [{pair: (i + 1) / (pair.key + pair.value) for pair in ALL_PAIRS} for i in range(LAYERS)]
    monkeypatch.setattr(
        search_module.sensitivity,
        "measure",
        lambda run, recipes: (
            [FRONT] * LAYERS,
            [{pair: layer[pair] - 1 / 16 for pair in FRONT} for layer in errors],
        ),
    )

    def start(name, interrupt_after=None, settings=SETTINGS, page_size=64):
        engine = SimpleNamespace(
            settings=EngineSettings("a-model", page_size=page_size),
            num_layers=LAYERS,
            head_dim=64,
            kv_heads=2,
            full_precision_bytes=2,
        )
        run = TuningRun(engine, KVTunerConfig(residual_length=0), Texts(), tmp_path / name)
        measured = []

        def score(cache_format):
            if len(measured) == interrupt_after:
                raise KeyboardInterrupt
            mix = tuple(LayerBits(layer.key.nbits, layer.value.nbits) for layer in cache_format.layers)
            measured.append(mix)
            return Quality(kl=loss(mix), perplexity=10 + loss(mix), top1=0.5)

        monkeypatch.setattr(TuningRun, "scorer", lambda self, text: SimpleNamespace(score=score))
        try:
            return search(run, settings), measured
        except KeyboardInterrupt:
            return None, measured

    start.folder = tmp_path
    return start


def test_the_front_keeps_the_cap_and_improves_on_uniform_pairs(start):
    front, measured = start("run")
    assert len(set(measured)) == len(measured) <= SETTINGS.trials + len(ALL_PAIRS)
    assert all(point.nominal_bits <= 4.0 for point in front)
    assert front[-1].quality.kl < loss((LayerBits(4, 4),) * LAYERS)
    kls = [point.quality.kl for point in front]
    assert kls == sorted(kls, reverse=True) and len(set(kls)) == len(kls)


@pytest.mark.parametrize("interrupt_after", [0, 4, 12, 20])
def test_an_interrupted_search_ends_like_an_uninterrupted_one(start, interrupt_after):
    expected, all_at_once = start("one")
    front, before = start("two", interrupt_after)
    assert front is None and len(before) == interrupt_after
    front, after = start("two")
    assert front == expected
    assert before + after == all_at_once  # nothing was measured twice, and in the same order
    for name in ("front.md", "front.json", "best.yaml"):
        assert (start.folder / "one" / name).read_bytes() == (start.folder / "two" / name).read_bytes()


def test_a_torn_last_line_loses_one_score(start):
    _, measured = start("run")
    journal = start.folder / "run" / "scores.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    _, again = start("run")
    assert again == measured[-1:]


def test_a_finished_search_measures_nothing_and_more_trials_go_on(start):
    start("run")
    assert start("run")[1] == []
    more = SearchSettings(**{**vars(SETTINGS), "trials": SETTINGS.trials + 5})
    assert len(start("run", settings=more)[1]) == 5


def test_a_folder_of_another_run_is_refused(start):
    start("run")
    journal = start.folder / "run" / "scores.jsonl"
    journal.write_text(journal.read_text().replace("a-model", "another-model"))
    with pytest.raises(TuningError, match="holds a run with model 'another-model', this one has 'a-model'"):
        start("run")


def test_every_point_is_a_preset_with_a_header(start):
    front, _ = start("run")
    files = sorted((start.folder / "run" / "presets").iterdir())
    assert [load_preset(str(file)) for file in files] == [point.mix for point in front]
    assert load_preset(str(start.folder / "run" / "best.yaml")) == front[-1].mix
    header = read_header(str(start.folder / "run" / "best.yaml"))
    assert header["model"] == "a-model"
    assert header["recipe"].startswith("--kvtuner-asym false --kvtuner-axis-key 0")
    assert header["bits"].startswith(f"{front[-1].nominal_bits:.4g} nominal, ")
    assert f"KL {front[-1].quality.kl:.6g} nats" in header["quality"]


def test_the_header_names_pages_of_another_size_than_the_default(start):
    for page_size, named in ((64, False), (32, True)):
        start(f"pages-{page_size}", page_size=page_size)
        recipe = read_header(str(start.folder / f"pages-{page_size}" / "best.yaml"))["recipe"]
        assert ("--page-size" in recipe) == named == recipe.endswith(" --page-size 32")


def test_a_cap_below_every_mix_is_refused_after_the_sensitivity(start):
    with pytest.raises(TuningError, match="--max-bits is 1.5; the smallest average that the pruned pairs allow is 2"):
        start("run", settings=SearchSettings(max_bits=1.5))
    assert (start.folder / "run" / "groups.json").exists()


def test_start_points_are_the_best_of_all_choices():
    groups = (LayerGroup((0, 2), FRONT), LayerGroup((1,), FRONT[1:]), LayerGroup((3, 4), FRONT[:4]))
    damage = [[9.0, 4.0, 2.0, 0.5, 0.0], [6.0, 5.0, 1.0, 0.0], [3.0, 2.5, 2.4, 0.1]]
    found = additive_optima(groups, damage, most_bits=4.5)
    bits = {c: average_bits(mix_of(groups, c)) for c in itertools.product(range(5), range(4), range(4))}
    total = {c: sum(d[i] for d, i in zip(damage, c)) for c in bits if bits[c] <= 4.5}
    assert total[found[-1]] == min(total.values())
    for choice in found:
        assert total[choice] == min(t for c, t in total.items() if bits[c] <= bits[choice])


def test_start_points_are_spread_from_the_most_bits_down():
    choices = [(i,) for i in range(11)]
    assert spread(choices, 3) == [(10,), (5,), (0,)]
    assert spread(choices, 1) == [(10,)]
    assert spread(choices[:2], 3) == [(1,), (0,)]


def test_average_bits():
    assert average_bits((LayerBits(8, 4), LayerBits(2, 2))) == 4.0
