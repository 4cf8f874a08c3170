"""Pruning of a layer's pairs to its Pareto front, and groups of layers that may share a choice.

Source: KVTuner (arXiv 2502.04420): intra-layer pruning of precision pairs and inter-layer clustering.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sglang.srt.kvtuner.config.preset import LayerBits

Point = TypeVar("Point")
# Choice per group: an index into its front.
Choice = tuple[int, ...]


@dataclass(frozen=True)
class LayerGroup:
    """Layers that share a front. front: pairs by rising bits and falling error."""

    layers: tuple[int, ...]
    front: tuple[LayerBits, ...]


def mix_of(groups: tuple[LayerGroup, ...], choice: Choice) -> tuple[LayerBits, ...]:
    """The pairs of all layers."""
    pairs = {i: group.front[index] for group, index in zip(groups, choice, strict=True) for i in group.layers}
    return tuple(pairs[i] for i in range(len(pairs)))


def falling(points: Iterable[Point], loss: Callable[[Point], float]) -> list[Point]:
    """Of points by rising cost, those that lose less than every one before: the Pareto front."""
    kept: list[Point] = []
    for point in points:
        if not kept or loss(point) < loss(kept[-1]):
            kept.append(point)
    return kept


def pareto_front(errors: dict[LayerBits, float]) -> tuple[LayerBits, ...]:
    """The pairs that no other pair beats with at most their bits and at most their error, by rising bits.

    Of pairs with the same bits and error the one with more key bits stays.
    """
    pairs = sorted(errors, key=lambda p: (p.key + p.value, errors[p], -p.key))
    return tuple(falling(pairs, errors.__getitem__))


def group_layers(
    fronts: list[tuple[LayerBits, ...]], errors: list[dict[LayerBits, float]], *, most: int
) -> tuple[LayerGroup, ...]:
    """Groups of layers with the same front and similar errors; ``most`` of them, or one per front if that is more.

    errors: per layer, at least for the pairs of its front; layers are compared by the largest distance of the errors'
    logarithms (complete linkage). Groups come in the order of their first layers.
    """
    clusters = {front: [[i] for i, f in enumerate(fronts) if f == front] for front in fronts}
    points = [np.log(np.maximum([e[p] for p in front], 1e-9)) for front, e in zip(fronts, errors)]

    def distance(a: list[int], b: list[int]) -> float:
        return max(float(np.abs(points[i] - points[j]).max()) for i in a for j in b)

    while sum(map(len, clusters.values())) > most:
        merges = [
            (distance(a, b), a, b, of_front)
            for of_front in clusters.values()
            for i, a in enumerate(of_front)
            for b in of_front[i + 1 :]
        ]
        if not merges:
            break
        _, a, b, of_front = min(merges, key=lambda m: m[:3])
        of_front.remove(b)
        a.extend(b)
    groups = [LayerGroup(tuple(sorted(c)), front) for front, found in clusters.items() for c in found]
    return tuple(sorted(groups, key=lambda g: g.layers))
