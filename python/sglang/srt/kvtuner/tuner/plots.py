"""Plots of a run: sensitivity as heat maps, the search as a front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang.srt.kvtuner.tuner.attention_error import ErrorTable
from sglang.srt.kvtuner.tuner.errors import import_optional
from sglang.srt.kvtuner.tuner.recipe import ALL_PAIRS, recipe_name


def heat_map(path: Path, errors: ErrorTable) -> None:
    """One map per recipe: layers down, pairs across, colour by the logarithm of the error."""
    figure, axes = _subplots(len(errors), width=3.6, height=0.16 * len(next(iter(errors.values()))) + 1.6)
    colors = import_optional("matplotlib.colors")
    values = [e for layers in errors.values() for layer in layers for e in layer.values()]
    scale = colors.LogNorm(max(min(values), 1e-6), max(max(values), 1e-5))
    for axis, (recipe, layers) in zip(axes, errors.items()):
        image = axis.imshow(
            [[layer[pair] for pair in ALL_PAIRS] for layer in layers], aspect="auto", norm=scale, cmap="viridis"
        )
        axis.set_title(recipe_name(recipe), fontsize=8)
        axis.set_xticks(range(len(ALL_PAIRS)), map(str, ALL_PAIRS), rotation=90, fontsize=7)
        axis.set_xlabel("bits")
        axis.set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="relative error of the attention output")
    _save(figure, path)


def front_plot(
    path: Path,
    scored: list[tuple[float, float]],
    front: list[tuple[float, float]],
    uniform: dict[str, tuple[float, float]],
) -> None:
    """Average stored bits against KL, points (bits, kl): everything scored, the front, uniform pairs by name."""
    figure, (axis,) = _subplots(1, width=6.5, height=4.5)
    axis.scatter(*zip(*scored), s=10, color="0.7", label="scored")
    axis.scatter(*zip(*uniform.values()), s=24, marker="x", color="tab:red", label="same pair in all layers")
    for name, point in uniform.items():
        axis.annotate(name, point, fontsize=7, xytext=(3, 3), textcoords="offset points")
    axis.plot(*zip(*front), marker="o", markersize=4, color="tab:blue", label="front")
    axis.set_yscale("log")
    axis.set_xlabel("average stored bits per element")
    axis.set_ylabel("KL from the unquantized model, nats")
    axis.legend()
    _save(figure, path)


def _subplots(count: int, *, width: float, height: float) -> tuple[Any, Any]:
    # Without pyplot there is no window system to choose and no figure to close.
    figure = import_optional("matplotlib.figure").Figure(figsize=(width * count, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
