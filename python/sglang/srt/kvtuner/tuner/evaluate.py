"""Final figures of a list of configurations on text that nothing was tuned on, and of a task that a server answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sglang.srt.kvtuner.config.cache_format import CacheFormat, build_cache_format
from sglang.srt.kvtuner.config.flags import KVTunerConfig
from sglang.srt.kvtuner.config.preset_header import recipe_flags
from sglang.srt.kvtuner.tuner.outputs import QUALITY_HEAD, quality_cells, text_table, write_json, write_text
from sglang.srt.kvtuner.tuner.recipe import parse_pair, parse_recipe, recipe_name
from sglang.srt.kvtuner.tuner.run import FINAL, TuningRun
from sglang.srt.kvtuner.tuner.score import Quality

UNQUANTIZED = "unquantized"


@dataclass(frozen=True)
class Configuration:
    """One row: without ``config`` and ``cache_format`` it is upstream's cache. flags: what a server takes for it."""

    name: str
    config: KVTunerConfig | None = None
    cache_format: CacheFormat | None = None

    @property
    def flags(self) -> list[str]:
        config = self.config
        if config is None:
            return []
        if config.preset is None:
            bits = ["--kvtuner-nbits-key", str(config.nbits_key), "--kvtuner-nbits-value", str(config.nbits_value)]
        else:
            bits = ["--kvtuner-config", config.preset]
        lengths = ["--kvtuner-residual-length", str(config.residual_length)]
        lengths += ["--page-size", str(self.cache_format.page_size)]
        return ["--enable-kvtuner-quant", *bits, *recipe_flags(config).split(), *lengths]


@dataclass(frozen=True)
class Row:
    """A configuration with its bits per element and figures. tasks: score by task's name."""

    configuration: Configuration
    nominal_bits: float
    stored_bits: float
    quality: Quality
    tasks: dict[str, float]


def parse_configuration(spec: str, base: KVTunerConfig, **shape: int) -> Configuration:
    """``unquantized``, a pair (``K8V4``) or a preset's path; pair and preset with a recipe before a colon where it is
    not the run's (``asym/K-channel/V-token/g64:K4V4``). shape: see :attr:`TuningRun.shape`.

    Raises TuningError, and KVTunerConfigError for what does not fit the model or a preset that cannot be used.
    """
    if spec == UNQUANTIZED:
        return Configuration(spec)
    recipe, colon, bits = spec.partition(":")
    config = parse_recipe(recipe, base) if colon else base
    bits = bits if colon else spec
    if bits.endswith((".yaml", ".yml")) or Path(bits).exists():
        config = replace(config, preset=bits)
    else:
        pair = parse_pair(bits)
        config = replace(config, nbits_key=pair.key, nbits_value=pair.value, preset=None)
    return Configuration(spec, config, build_cache_format(config, **shape))


def evaluate(
    run: TuningRun, specs: list[str], task: Callable[[Configuration], dict[str, float]] | None = None
) -> list[Row]:
    """Score configurations on the final text, and with ``task`` where given.

    evaluation.md and evaluation.json in the run's folder are written anew after every row.
    """
    configurations = [parse_configuration(spec, run.config, **run.shape) for spec in specs]
    rows: list[Row] = []
    with run.progress(len(configurations), "evaluate") as bar:
        for configuration in configurations:
            row = _score(run, configuration)
            if task is not None:
                row = replace(row, tasks=task(configuration))
            rows.append(row)
            _write(run, rows)
            bar.update()
    return rows


def table(rows: list[Row]) -> str:
    """The rows as one Markdown table."""
    tasks = sorted({name for row in rows for name in row.tasks})
    head = ("configuration", "recipe", "nominal bits", "stored bits", *QUALITY_HEAD, *tasks)
    return text_table(
        head,
        [
            (
                row.configuration.name,
                "" if row.configuration.config is None else recipe_name(row.configuration.config),
                f"{row.nominal_bits:.3f}",
                f"{row.stored_bits:.3f}",
                *quality_cells(row.quality),
                *(f"{100 * row.tasks[name]:.1f} %" if name in row.tasks else "" for name in tasks),
            )
            for row in rows
        ],
    )


def _score(run: TuningRun, configuration: Configuration) -> Row:
    cache_format, scorer = configuration.cache_format, run.scorer(FINAL)
    if cache_format is None:
        bits = 8.0 * run.engine.full_precision_bytes
        return Row(configuration, bits, bits, scorer.unquantized(), {})
    return Row(
        configuration,
        sum(cache_format.nominal_bits()) / 2,
        sum(cache_format.stored_bits()) / 2,
        scorer.score(cache_format),
        {},
    )


def _write(run: TuningRun, rows: list[Row]) -> None:
    write_text(run.folder / "evaluation.md", table(rows))
    content = [
        {
            "configuration": row.configuration.name,
            "flags": row.configuration.flags,
            "nominal_bits": row.nominal_bits,
            "stored_bits": row.stored_bits,
            **asdict(row.quality),
            "tasks": row.tasks,
        }
        for row in rows
    ]
    write_json(run.folder / "evaluation.json", content)
