"""Pairs of bits, and cache formats that mix them over layers within one recipe (axes, symmetry, group size)."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

from sglang.srt.kvtuner.config.cache_format import CacheFormat, build_cache_format
from sglang.srt.kvtuner.config.flags import KVTunerConfig
from sglang.srt.kvtuner.config.preset import LayerBits
from sglang.srt.kvtuner.format.quantizer import SUPPORTED_BITS
from sglang.srt.kvtuner.tuner.errors import TuningError

ALL_PAIRS = tuple(LayerBits(key, value) for key, value in product(sorted(SUPPORTED_BITS, reverse=True), repeat=2))
BEST_PAIR = LayerBits(8, 8)


def parse_pair(text: str) -> LayerBits:
    """The pair of a name like ``K8V4``. Raises TuningError."""
    match = re.fullmatch(r"K(2|4|8|16)V(2|4|8|16)", text.upper())
    if match is None:
        raise TuningError(f"{text!r} is no pair of bits; valid are K2V2 to K16V16, widths 2, 4, 8 and 16")
    return LayerBits(int(match[1]), int(match[2]))


def average_bits(mix: tuple[LayerBits, ...]) -> float:
    """Nominal bits per element, the mean of K and V over layers."""
    return sum(pair.key + pair.value for pair in mix) / (2 * len(mix))


def recipe_name(config: KVTunerConfig, **changes: Any) -> str:
    """Symmetry, axes and group size in words, without commas or spaces. changes: fields that differ from ``config``'s,
    even where no config can have them."""
    fields = {**vars(config), **changes}
    axes = {0: "token", 1: "channel"}
    symmetry = "asym" if fields["asym"] else "sym"
    group = "all" if fields["group_size"] == -1 else str(fields["group_size"])
    key = axes[fields["axis_key"]] + ("-rotated" if fields["hadamard_key"] else "")
    return f"{symmetry}/K-{key}/V-{axes[fields['axis_value']]}/g{group}"


def parse_recipe(name: str, base: KVTunerConfig) -> KVTunerConfig:
    """The recipe of a :func:`recipe_name`, with the residual and sink length of ``base``. Raises TuningError."""
    match = re.fullmatch(r"(a?sym)/K-(token|channel)(-rotated)?/V-(token|channel)/g(\d+|all)", name)
    if match is None:
        raise TuningError(f"{name!r} is no recipe; an example of a valid one is {recipe_name(base)}")
    symmetry, key, rotated, value, group = match.groups()
    return replace(
        base,
        asym=symmetry == "asym",
        axis_key=int(key == "channel"),
        hadamard_key=rotated is not None,
        axis_value=int(value == "channel"),
        group_size=-1 if group == "all" else int(group),
    )


class FormatMaker:
    """Cache formats for one model and recipe. Raises KVTunerConfigError for a recipe that a server refuses."""

    def __init__(self, config: KVTunerConfig, *, num_layers: int, head_dim: int, page_size: int) -> None:
        self._uniform = {
            pair: build_cache_format(
                replace(config, nbits_key=pair.key, nbits_value=pair.value, preset=None),
                num_layers=num_layers,
                head_dim=head_dim,
                page_size=page_size,
            )
            for pair in ALL_PAIRS
        }

    def cache_format(self, mix: tuple[LayerBits, ...]) -> CacheFormat:
        """The cache format whose layer i has the pair ``mix[i]``."""
        return replace(self._uniform[mix[0]], layers=tuple(self._uniform[pair].layers[i] for i, pair in enumerate(mix)))

    def stored_bits(self, mix: tuple[LayerBits, ...]) -> float:
        """Stored bits per element, scales and zero points included, the mean of K and V over layers."""
        return sum(self.cache_format(mix).stored_bits()) / 2
