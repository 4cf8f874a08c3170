"""Where the search starts: the mixes that an additive model of the layers' own damage finds best."""

from __future__ import annotations

from sglang.srt.kvtuner.tuner.pareto import Choice, LayerGroup, falling


def additive_optima(groups: tuple[LayerGroup, ...], damage: list[list[float]], *, most_bits: float) -> list[Choice]:
    """Choices on the front of (average bits, summed damage) up to ``most_bits``, by rising bits.

    damage: per group, per pair of its front, what that pair alone adds to the output's divergence. The sum over groups
    is minimized exactly for every total of bits (a knapsack, solved by dynamic programming over groups).
    """
    layers = sum(len(group.layers) for group in groups)
    budget = int(2 * layers * most_bits + 1e-9)
    best: dict[int, tuple[float, Choice]] = {0: (0.0, ())}
    for group, costs in zip(groups, damage, strict=True):
        following: dict[int, tuple[float, Choice]] = {}
        for bits, (total, choice) in best.items():
            for index, pair in enumerate(group.front):
                spent = bits + (pair.key + pair.value) * len(group.layers)
                found = (total + costs[index], (*choice, index))
                if spent <= budget and (spent not in following or found < following[spent]):
                    following[spent] = found
        best = following
    return [choice for _, choice in falling((best[bits] for bits in sorted(best)), lambda found: found[0])]


def spread(choices: list[Choice], count: int) -> list[Choice]:
    """At most ``count`` of the choices, evenly spaced, the last always among them, the last first."""
    if len(choices) <= count:
        return choices[::-1]
    step = (len(choices) - 1) / max(count - 1, 1)
    return [choices[len(choices) - 1 - round(i * step)] for i in range(count)]
