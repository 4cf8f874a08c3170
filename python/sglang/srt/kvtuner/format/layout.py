"""Where a code lies in a block: the one definition of the bit layout, for every width and device.

A layout answers :meth:`~CodeLayout.byte_of` and :meth:`~CodeLayout.shift_of` for each (token, channel) of a page; packing and
unpacking follow from them. Codes are stored offset binary (code - q_min), so that unpacking is a mask and a shift.

Attention multiplies rows (queries, or probabilities) by the matrix x[reduction, lanes]: for keys (``token_lanes``) the lanes
are tokens and the reduction is over channels, for values the lanes are channels and the reduction is over tokens.

* :class:`VectorLayout`: vectors of 64 bytes, [reduction / span, lanes / 16], span = 32 / bits. Each of a vector's 16 lanes has
  two 16-bit words, little-endian; word h holds elements h, 2 + h, 4 + h … of the span from its lowest bits up, so that a
  shift and a mask give pairs of neighbours of the reduction. Its 32-bit words are tensor-core fragments as they are.
* :class:`RowLayout`, where lanes or reduction do not fill vectors: rows of tokens; byte j of a row of n channels holds code j
  of each of its 8 / bits parts of n * bits / 8 channels, the first part in the lowest bits.

16 bits are bfloat16 values in the same places, little-endian. The same layout in C++:
sgl-kernel/include/sgl_kernel/kvtuner/kv_codec.h.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import torch

from sglang.srt.kvtuner.format.quantizer import SUPPORTED_BITS, code_range

LANES = 16
VECTOR_BYTES = 64

Index = TypeVar("Index", int, torch.Tensor)


def codes_per_byte(nbits: int) -> int:
    """4, 2 or 1 for 2, 4 or 8 bits. Raises ValueError for other widths."""
    if nbits not in SUPPORTED_BITS:
        raise ValueError(f"nbits is {nbits!r}; supported are {SUPPORTED_BITS}")
    return 8 // nbits


@dataclass(frozen=True)
class CodeLayout(ABC):
    """Places of the page_size x head_dim codes of ``nbits`` (2, 4, 8, or 16 for bfloat16) in a block."""

    nbits: int
    page_size: int
    head_dim: int

    @abstractmethod
    def byte_of(self, token: Index, channel: Index) -> Index:
        """First byte of a code; numbers, or int64 tensors of them."""

    @abstractmethod
    def shift_of(self, token: Index, channel: Index) -> Index:
        """The code's lowest bit in that byte."""

    @property
    def code_bytes(self) -> int:
        return self.page_size * self.head_dim * self.nbits // 8

    def pack_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes int8 [..., page_size, head_dim] (bfloat16 values at 16 bits) to uint8 [..., code_bytes]."""
        if self.nbits == 16:
            words = codes.view(torch.int16).flatten(-2)[..., _code_at(self, codes.device)[0]]
            return words.view(torch.uint8)
        unsigned = (codes.to(torch.int16) - code_range(self.nbits)[0]).to(torch.uint8).flatten(-2)
        first, *others = _code_at(self, codes.device)
        packed = unsigned[..., first]
        for part, index in enumerate(others, start=1):
            packed |= unsigned[..., index] << part * self.nbits
        return packed

    def unpack_codes(self, packed: torch.Tensor) -> torch.Tensor:
        """uint8 [..., code_bytes] to codes int8 [..., page_size, head_dim] (bfloat16 values at 16 bits): the inverse of
        :meth:`pack_codes`."""
        unit, shift = _place_of(self, packed.device)
        if self.nbits == 16:
            values = packed.contiguous().view(torch.int16)[..., unit].view(torch.bfloat16)
            return values.unflatten(-1, (self.page_size, self.head_dim))
        unsigned = (packed[..., unit] >> shift) & ((1 << self.nbits) - 1)
        codes = (unsigned.to(torch.int16) + code_range(self.nbits)[0]).to(torch.int8)
        return codes.unflatten(-1, (self.page_size, self.head_dim))


@dataclass(frozen=True)
class VectorLayout(CodeLayout):
    """See the module. ``token_lanes``: True for keys."""

    token_lanes: bool

    @staticmethod
    def fills(nbits: int, page_size: int, head_dim: int, token_lanes: bool) -> bool:
        """Whether lanes and reduction fill vectors."""
        lanes, reduction = (page_size, head_dim) if token_lanes else (head_dim, page_size)
        return lanes % LANES == 0 and reduction % (32 // nbits) == 0

    def byte_of(self, token: Index, channel: Index) -> Index:
        lanes = self.page_size if self.token_lanes else self.head_dim
        element, lane = (channel, token) if self.token_lanes else (token, channel)
        span = 32 // self.nbits
        vector = element // span * (lanes // LANES) + lane // LANES
        plane = element % span // 2
        return vector * VECTOR_BYTES + lane % LANES * 4 + element % 2 * 2 + plane * self.nbits // 8

    def shift_of(self, token: Index, channel: Index) -> Index:
        element = channel if self.token_lanes else token
        return element % (32 // self.nbits) // 2 * self.nbits % 8


@dataclass(frozen=True)
class RowLayout(CodeLayout):
    """See the module. No kernel reads it: the reference serves head sizes and pages that do not fill vectors."""

    def byte_of(self, token: Index, channel: Index) -> Index:
        row = self.head_dim * self.nbits // 8
        if self.nbits == 16:
            return token * row + channel * 2
        return token * row + channel % row

    def shift_of(self, token: Index, channel: Index) -> Index:
        if self.nbits == 16:
            return channel * 0
        return channel // (self.head_dim * self.nbits // 8) * self.nbits


def layout_of(nbits: int, page_size: int, head_dim: int, token_lanes: bool) -> CodeLayout:
    """The layout of a page: vectors where they can be filled."""
    if VectorLayout.fills(nbits, page_size, head_dim, token_lanes):
        return VectorLayout(nbits, page_size, head_dim, token_lanes)
    return RowLayout(nbits, page_size, head_dim)


@lru_cache(maxsize=64)
def _place_of(layout: CodeLayout, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Per code, in the order of [page_size, head_dim]: its byte (its 16-bit word at 16 bits), int64, and shift, uint8."""
    token = torch.arange(layout.page_size)[:, None].expand(-1, layout.head_dim).flatten()
    channel = torch.arange(layout.head_dim).repeat(layout.page_size)
    unit = layout.byte_of(token, channel) // (2 if layout.nbits == 16 else 1)
    return unit.to(device), layout.shift_of(token, channel).to(torch.uint8).to(device)


@lru_cache(maxsize=64)
def _code_at(layout: CodeLayout, device: torch.device) -> torch.Tensor:
    """Per part of a byte and byte (16-bit word at 16 bits) the code that lies there, int64 [parts, bytes]."""
    unit, shift = _place_of(layout, torch.device("cpu"))
    parts = 1 if layout.nbits == 16 else codes_per_byte(layout.nbits)
    found = torch.full((parts, unit.numel() // parts), -1)
    found[shift.long() // layout.nbits, unit] = torch.arange(unit.numel())
    assert (found >= 0).all(), f"{layout} leaves a part of a byte without a code"
    return found.to(device)
