"""What one layer's K or V looks like in the packed cache, to the byte.

A *block* is the packed form of one page of one KV head: codes, then scales, then zero points, or bfloat16 values alone.
``block_bytes`` counts all of it, so that pool sizing, reports and buffers share one figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sglang.srt.kvtuner.format.layout import CodeLayout, codes_per_byte, layout_of
from sglang.srt.kvtuner.format.quantizer import PER_TOKEN, UNQUANTIZED_BITS

SCALE_DTYPE = torch.float16
ZERO_DTYPE = torch.int16
PARAMETER_BYTES = 2


@dataclass(frozen=True)
class TensorFormat:
    """Format of K or V in one layer.

    nbits: 2, 4, 8, or 16 for bfloat16 values (see :meth:`unquantized`). asym: zero points are stored. axis: 0 groups
    along head_dim, 1 along the tokens of a page. group_size: elements that share a scale (resolved, never -1).
    page_size: tokens of a page. head_dim: elements of a token in one head. token_lanes: which way codes lie in a block
    (layout.py), True for keys. hadamard: rows are rotated in blocks of that many channels before they are quantized
    (hadamard.py), 0 where they are not. Raises ValueError when a group or a block does not divide its dimension, codes
    do not fill whole bytes, or an unquantized format has parameters of a quantizer.
    """

    nbits: int
    asym: bool
    axis: int
    group_size: int
    page_size: int
    head_dim: int
    token_lanes: bool = False
    hadamard: int = 0

    def __post_init__(self) -> None:
        grouped = self.head_dim if self.axis == PER_TOKEN else self.page_size
        if self.group_size <= 0 or grouped % self.group_size:
            raise ValueError(f"a group of {self.group_size} does not divide {grouped} (axis {self.axis})")
        if not self.quantized:
            if self.asym or self.axis != PER_TOKEN or self.group_size != self.head_dim or self.hadamard:
                raise ValueError(f"{self.nbits} bits have no groups: make them with TensorFormat.unquantized")
        elif self.head_dim % codes_per_byte(self.nbits):
            raise ValueError(f"head_dim {self.head_dim} at {self.nbits} bits does not fill whole bytes")
        if self.hadamard and (self.hadamard & (self.hadamard - 1) or self.head_dim % self.hadamard):
            raise ValueError(f"a rotation block of {self.hadamard} is no power of two that divides {self.head_dim}")

    @classmethod
    def unquantized(cls, page_size: int, head_dim: int, token_lanes: bool = False) -> TensorFormat:
        """bfloat16 pages: 16 stored bits per element. There is one such format per shape, so that formats which store
        the same are equal; asym, axis, group_size and hadamard mean nothing in it."""
        return cls(UNQUANTIZED_BITS, False, PER_TOKEN, head_dim, page_size, head_dim, token_lanes)

    @property
    def layout(self) -> CodeLayout:
        """Where codes lie in a block."""
        return layout_of(self.nbits, self.page_size, self.head_dim, self.token_lanes)

    @property
    def quantized(self) -> bool:
        return self.nbits != UNQUANTIZED_BITS

    @property
    def parameter_shape(self) -> tuple[int, int]:
        """Shape of the scales (and zero points) of a block."""
        if self.axis == PER_TOKEN:
            return self.page_size, self.head_dim // self.group_size
        return self.page_size // self.group_size, self.head_dim

    @property
    def code_bytes(self) -> int:
        return self.page_size * self.head_dim * self.nbits // 8

    @property
    def scale_bytes(self) -> int:
        if not self.quantized:
            return 0
        return math.prod(self.parameter_shape) * PARAMETER_BYTES

    @property
    def zero_bytes(self) -> int:
        return self.scale_bytes if self.asym else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of one page of one head."""
        return self.code_bytes + self.scale_bytes + self.zero_bytes

    @property
    def stored_bits(self) -> float:
        """Stored bits per element, group parameters included."""
        return self.block_bytes * 8 / (self.page_size * self.head_dim)


@dataclass(frozen=True)
class LayerFormat:
    """Formats of one layer's keys and values. sink_length: first tokens of every sequence that stay in full precision
    beside them (sinks.py)."""

    key: TensorFormat
    value: TensorFormat
    sink_length: int = 0

    @property
    def page_bytes_per_head(self) -> int:
        return self.key.block_bytes + self.value.block_bytes
