"""The search: pruned pairs, grouped layers, NSGA-II, and the front that it leaves in the run's folder."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sglang.srt.kvtuner.config.preset_header import preset_recipe
from sglang.srt.kvtuner.tuner import sensitivity
from sglang.srt.kvtuner.tuner.errors import TuningError
from sglang.srt.kvtuner.tuner.journal import Mix
from sglang.srt.kvtuner.tuner.nsga import nsga_search
from sglang.srt.kvtuner.tuner.outputs import (
    QUALITY_HEAD,
    quality_cells,
    text_table,
    write_json,
    write_preset,
    write_text,
)
from sglang.srt.kvtuner.tuner.pareto import Choice, LayerGroup, falling, group_layers, mix_of
from sglang.srt.kvtuner.tuner.plots import front_plot
from sglang.srt.kvtuner.tuner.recipe import ALL_PAIRS, average_bits
from sglang.srt.kvtuner.tuner.run import SEARCH, TuningRun
from sglang.srt.kvtuner.tuner.score import Quality
from sglang.srt.kvtuner.tuner.starts import additive_optima, spread


@dataclass(frozen=True)
class SearchSettings:
    """max_bits: cap on average nominal bits. groups: most groups of layers. trials: different mixes to score.
    population: NSGA-II's. starts: how many of the trials come from the additive model. seed: of everything random.

    Raises TuningError for numbers that leave nothing to search.
    """

    max_bits: float = 4.0
    groups: int = 12
    trials: int = 100
    population: int = 16
    starts: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("groups", "trials", "starts"):
            if getattr(self, name) < 1:
                raise TuningError(f"--{name} is {getattr(self, name)}; valid are 1 and above")
        if self.population < 2:
            raise TuningError(f"--population is {self.population}; valid are 2 and above")


@dataclass(frozen=True)
class FrontPoint:
    """A mix of the front. nominal and stored bits per element; quality on the search text."""

    mix: Mix
    nominal_bits: float
    stored_bits: float
    quality: Quality


def search(run: TuningRun, settings: SearchSettings) -> list[FrontPoint]:
    """Run or continue the search; returns the front by rising bits.

    Writes groups.json, front.md, front.json, front.png, presets/*.yaml and best.yaml, the point of least divergence.

    Raises TuningError where no mix meets the cap, after the sensitivity has been written.
    """
    fronts, damage = sensitivity.measure(run, (run.config,))
    groups = group_layers(fronts, damage, most=settings.groups)
    _write_groups(run, groups)
    least = average_bits(mix_of(groups, (0,) * len(groups)))
    if least > settings.max_bits + 1e-9:
        raise TuningError(
            f"--max-bits is {settings.max_bits:g}; the smallest average that the pruned pairs allow is {least:g}. The "
            f"sensitivity is in {run.folder}"
        )
    group_damage = [[sum(damage[i][pair] for i in group.layers) for pair in group.front] for group in groups]
    optima = additive_optima(groups, group_damage, most_bits=settings.max_bits)
    uniform = [(pair,) * run.engine.num_layers for pair in ALL_PAIRS]
    found = run.score_all(SEARCH, uniform, "search: uniform pairs")
    scored = _search_choices(run, settings, groups, spread(optima, settings.starts))
    allowed = {mix: q for mix, q in found.items() if average_bits(mix) <= settings.max_bits + 1e-9}
    front = pareto_points(run, {**allowed, **scored})
    _write_front(run, front, scored, found)
    return front


def pareto_points(run: TuningRun, scored: dict[Mix, Quality]) -> list[FrontPoint]:
    """The mixes that no other beats with at most their bits and at most their divergence, by rising bits."""
    points = [FrontPoint(mix, average_bits(mix), run.formats.stored_bits(mix), q) for mix, q in scored.items()]
    points.sort(key=lambda point: (point.nominal_bits, point.quality.kl))
    return falling(points, lambda point: point.quality.kl)


def _search_choices(
    run: TuningRun, settings: SearchSettings, groups: tuple[LayerGroup, ...], starts: list[Choice]
) -> dict[Mix, Quality]:
    scored: dict[Mix, Quality] = {}
    bar = None

    def score(choice: Choice) -> float:
        nonlocal bar
        mix = mix_of(groups, choice)
        if bar is None and run.journal.get(SEARCH, mix) is None:
            bar = run.progress(settings.trials, "search: NSGA-II", done=len(scored))
        scored[mix] = run.score(SEARCH, mix)
        if bar is not None:
            bar.update()
        return scored[mix].kl

    nsga_search(
        groups,
        starts,
        score,
        most_bits=settings.max_bits,
        trials=settings.trials,
        population=settings.population,
        seed=settings.seed,
    )
    if bar is not None:
        bar.close()
    return scored


def _write_groups(run: TuningRun, groups: tuple[LayerGroup, ...]) -> None:
    write_json(
        run.folder / "groups.json",
        [{"layers": list(group.layers), "front": list(map(str, group.front))} for group in groups],
    )


def _write_front(
    run: TuningRun, front: list[FrontPoint], scored: dict[Mix, Quality], uniform: dict[Mix, Quality]
) -> None:
    bits = run.formats.stored_bits
    names = [f"front-{i:02d}-{point.nominal_bits:.2f}bits.yaml" for i, point in enumerate(front)]
    for old in (run.folder / "presets").glob("front-*.yaml"):
        old.unlink()
    for name, point in zip(names, front):
        _write_preset(run, run.folder / "presets" / name, point)
    _write_preset(run, run.folder / "best.yaml", front[-1])
    rows = [
        (name, f"{p.nominal_bits:.3f}", f"{p.stored_bits:.3f}", *quality_cells(p.quality))
        for name, p in zip(names, front)
    ]
    rows += [
        (f"uniform {mix[0]}", f"{average_bits(mix):.3f}", f"{bits(mix):.3f}", *quality_cells(q))
        for mix, q in uniform.items()
    ]
    write_text(run.folder / "front.md", text_table(("mix", "nominal bits", "stored bits", *QUALITY_HEAD), rows))
    write_json(
        run.folder / "front.json",
        [
            {
                "preset": f"presets/{name}",
                "mix": " ".join(map(str, p.mix)),
                "nominal_bits": p.nominal_bits,
                "stored_bits": p.stored_bits,
                **asdict(p.quality),
            }
            for name, p in zip(names, front)
        ],
    )
    front_plot(
        run.folder / "front.png",
        [(bits(mix), q.kl) for mix, q in scored.items()],
        [(p.stored_bits, p.quality.kl) for p in front],
        {str(mix[0]): (bits(mix), q.kl) for mix, q in uniform.items()},
    )


def _write_preset(run: TuningRun, path: Path, point: FrontPoint) -> None:
    options = dict(hadamard_key=run.config.hadamard_key, sink_length=run.config.sink_length)
    write_preset(path, tuple(replace(pair, **options) for pair in point.mix), _header(run, point))


def _header(run: TuningRun, point: FrontPoint) -> dict[str, str]:
    engine, quality = run.engine, point.quality
    return {
        "written by": "sglang kvtuner search",
        "model": run.settings["model"],
        "recipe": preset_recipe(run.config, engine.settings.page_size),
        "bits": f"{point.nominal_bits:.4g} nominal, {point.stored_bits:.4g} stored per element",
        "quality": f"KL {quality.kl:.6g} nats, perplexity {quality.perplexity:.5g}, top-1 agreement {quality.top1:.4f}",
        "scored with": f"search text {run.settings['texts'][SEARCH]}, windows of {engine.settings.window} tokens in "
        f"chunks of {engine.settings.chunk}, residual length {run.config.residual_length}",
    }
