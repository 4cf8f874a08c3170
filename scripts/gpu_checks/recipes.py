"""Formats and shapes that checks run on: the recipes of the table in docs/gpu_kernels.md, and a preset's mix of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from triton_resources import RECIPES, Recipe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Query heads and KV heads of a rank: one KV head, groups of 1 to 16, more than a block of 16.
HEADS = ((8, 8), (1, 1), (5, 1), (16, 1), (20, 1), (32, 8), (32, 4))


def layer_format(recipe: Recipe) -> LayerFormat:
    return LayerFormat(recipe.key, recipe.value, recipe.sinks)


def short_name(recipe: Recipe) -> str:
    return recipe.name.replace(", head_dim ", " d")


def recipes(small: bool) -> tuple[Recipe, ...]:
    """All of them, or a few that have every width, both axes, rotation and sinks between them."""
    if not small:
        return RECIPES
    page16 = [r for r in RECIPES if r.key.page_size == 16]
    tiny = replace(page16[0], name="K 8at16 rotated V 2st16, head_dim 64, page 16, sinks 4", sinks=4)
    key = TensorFormat(8, True, 0, 16, 16, 64, True, 64)
    value = TensorFormat(2, False, 0, 16, 16, 64, False)
    return (
        replace(tiny, key=key, value=value),
        replace(tiny, name="K 4ac16 V 4sc16, head_dim 96, page 16", sinks=0, key=TensorFormat(4, True, 1, 16, 16, 96, True),
                value=TensorFormat(4, False, 1, 16, 16, 96, False)),
        replace(tiny, name="K 16 V 16, head_dim 64, page 16", sinks=0, key=TensorFormat.unquantized(16, 64, True),
                value=TensorFormat.unquantized(16, 64, False)),
    )  # fmt: skip


def mixed_layers(small: bool) -> tuple[LayerFormat, ...]:
    """Layers of one cache that differ in bits, axis, rotation and sinks, as a preset's do."""
    if small:
        return tuple(layer_format(recipe) for recipe in recipes(True) if recipe.key.head_dim == 64)
    page, dim = 64, 128
    return (
        LayerFormat(TensorFormat(4, True, 1, 64, page, dim, True), TensorFormat(4, True, 0, 64, page, dim, False)),
        LayerFormat(
            TensorFormat(8, True, 0, 64, page, dim, True, 128), TensorFormat(2, True, 0, 32, page, dim, False), 4
        ),
        LayerFormat(TensorFormat.unquantized(page, dim, True), TensorFormat(4, False, 0, 64, page, dim, False)),
    )
