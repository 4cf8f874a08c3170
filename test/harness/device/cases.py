"""Which layers the CUDA kernels serve, and the cases that they are tested on."""

import random
from dataclasses import dataclass, field
from itertools import product

import torch

from harness.formats import name_of, tensor_format
from sglang.srt.kvtuner.format.formats import LayerFormat

PAGE = 64
BITS = (2, 4, 8, 16)
HEAD_DIMS = (64, 96, 128, 256)
GROUPS = (1, 3, 4, 8, 16)  # query heads of a KV head
LENGTHS = (902, 1, 63, 319)  # tokens before the step: three pages and more for every warp, and two that complete a page


def supported(layer, bf16):
    """DecodeFormat::supported() of decode_format.h in Python."""
    key, value = layer.key, layer.value
    dim, span = key.head_dim, 32 // key.nbits
    unit = 16 if key.nbits == 16 else 4 * span
    key_group = 4 * span if key.axis == 0 else 32
    value_group = 32 if value.axis == 0 else 4 * (32 // value.nbits)
    fragments = (
        key.page_size == value.page_size == PAGE
        and value.head_dim == dim
        and dim % 32 == 0
        and dim % unit == 0
        and not (key.quantized and key.group_size % key_group)
        and not (value.quantized and value.group_size % value_group)
    )
    parameters = sum(half.parameter_shape[1 - half.axis] * (1 + half.asym) for half in (key, value))
    beside = 4 if key.hadamard or not key.quantized else 0
    return fragments and (dim <= 128 or (dim <= 256 and parameters + beside <= 12 and (key.quantized or bf16)))


@dataclass(frozen=True)
class Case:
    """One layer and one decode step of several requests. machine: how the kernels are launched and run (kernels.py)."""

    layer: LayerFormat
    dtype: torch.dtype
    group: int
    kv_heads: int
    residual: int
    machine: dict = field(hash=False)

    def __str__(self):
        sinks = f"-sinks{self.layer.sink_length}" if self.layer.sink_length else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{name_of(self.layer.key)}-{name_of(self.layer.value)}{sinks}-{dtype}-gqa{self.group}"


def draw_format(rng, nbits, head_dim, token_lanes):
    axis = rng.choice((0, 1))
    grouped = (head_dim, PAGE)[axis]
    group = rng.choice([g for g in (16, 32, 48, 64, 96, 128, 256) if grouped % g == 0])
    return tensor_format(
        nbits, rng.random() < 0.6, axis, group, PAGE, head_dim, token_lanes, token_lanes and rng.random() < 0.3
    )


def draw_case(rng, key_bits, value_bits):
    """A case of these widths that the kernels serve."""
    while True:
        dim, dtype = rng.choice(HEAD_DIMS), rng.choice((torch.float16, torch.bfloat16))
        key, value = draw_format(rng, key_bits, dim, True), draw_format(rng, value_bits, dim, False)
        layer = LayerFormat(key, value, rng.choice((0, 0, 4, PAGE)))
        if supported(layer, dtype == torch.bfloat16):
            break
    machine = {
        "splits": rng.choice((1, 1, 2, 5)),
        "merge_apart": rng.random() < 0.3,
        "late_copies": rng.choice((0, 1)),
        "order": rng.choice((0, 1, rng.randrange(2, 1000))),
        "cutting_mma": int(rng.random() < 0.2),
    }
    return Case(layer, dtype, rng.choice(GROUPS), rng.choice((1, 1, 2)), rng.choice((0, 64, 100)), machine)


def all_widths(each):
    """``each`` cases of every width of keys with every width of values, the same at every call."""
    return [
        draw_case(random.Random(f"{key}{value}{i}"), key, value)
        for key, value in product(BITS, BITS)
        for i in range(each)
    ]


def random_layers(count):
    """Layers of all kinds, served or not, and whether the model is in bfloat16."""
    rng = random.Random(count)
    for _ in range(count):
        dim = rng.choice((*HEAD_DIMS, 32, 160))
        halves = [draw_format(rng, rng.choice(BITS), dim, token_lanes) for token_lanes in (True, False)]
        yield LayerFormat(*halves), rng.random() < 0.5


def layer_of(key, value, head_dim=128, sinks=0):
    """key, value: (bits, asym, axis, group), keys with "rotated" as a fifth where they are."""
    rotated = bool(key[4:])
    return LayerFormat(
        tensor_format(*key[:4], PAGE, head_dim, True, rotated), tensor_format(*value, PAGE, head_dim, False), sinks
    )
