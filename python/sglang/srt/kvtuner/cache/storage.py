"""The cache's buffers, plain tensors without anything of upstream: packed pages, rings of the residual window, and sinks.

**Pages.** Upstream's page allocator hands out page ids; page 0 takes the writes of padded rows, as slot 0 does in upstream's
pools.

**Rings.** A request slot's ring holds its request's newest tokens in full precision: position p lies in row
``p % ring_length``.

**Sinks.** The first tokens of every sequence can stay in full precision beside its first page. Attention gives them much of
its weight (StreamingLLM, ICLR 2024, section 3), so that errors there cost more than elsewhere. Rows are kept per *page id*,
not per request: whoever reads a first page that another request packed, through the prefix cache or after upstream gave two
equal prefixes one page, finds the sinks of exactly that page. They are written when a page is packed as the first of its
sequence and stay valid as long as the page does; a page handed to another sequence is packed anew before it is read. What is
stored for pages that are never first is the price, and it is counted: see sizing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang.srt.kvtuner.cache import huge_pages
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat


@dataclass(frozen=True)
class TensorStorage:
    """Buffers of K or of V in one layer.

    pages: uint8 [num_pages, kv_heads, block_bytes]. ring: [num_slots, ring_length, kv_heads, head_dim] in the model's dtype.
    sinks: [num_pages, sink_length, kv_heads, head_dim] in the model's dtype; row t of page p is token t of the sequences that
    begin with p.
    """

    format: TensorFormat
    pages: torch.Tensor
    ring: torch.Tensor
    sinks: torch.Tensor


@dataclass(frozen=True)
class LayerStorage:
    """Buffers of one layer."""

    key: TensorStorage
    value: TensorStorage


@dataclass(frozen=True)
class CacheStorage:
    """Buffers of all layers of one rank.

    layers: in the order of the rank's layers. residual_length: newest tokens that a step must find in full precision.
    nonfinite_blocks: int64 [1], packed blocks (of a page, head, and K or V) so far that held an element that was NaN or infinite.
    """

    layers: tuple[LayerStorage, ...]
    page_size: int
    ring_length: int
    residual_length: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    nonfinite_blocks: torch.Tensor

    @classmethod
    def allocate(
        cls,
        formats: Sequence[LayerFormat],
        *,
        num_pages: int,
        num_slots: int,
        ring_length: int,
        residual_length: int,
        kv_heads: int,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> CacheStorage:
        """Zeroed buffers for ``num_pages`` pages (page 0 among them) and ``num_slots`` request slots."""
        first = formats[0].key

        def pages(halves: list[TensorFormat]) -> list[torch.Tensor]:
            return huge_pages.zeros([(num_pages, kv_heads, half.block_bytes) for half in halves], torch.uint8, device)

        def rows(shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
            return huge_pages.zeros([(*shape, kv_heads, first.head_dim) for shape in shapes], dtype, device)

        rings = [(num_slots, ring_length)] * len(formats)
        sinks = [(num_pages, layer.sink_length) for layer in formats]
        keys, values = [layer.key for layer in formats], [layer.value for layer in formats]
        halves = [
            [TensorStorage(*parts) for parts in zip(half, pages(half), rows(rings), rows(sinks), strict=True)]
            for half in (keys, values)
        ]
        return cls(
            layers=tuple(LayerStorage(key, value) for key, value in zip(*halves, strict=True)),
            page_size=first.page_size,
            ring_length=ring_length,
            residual_length=residual_length,
            kv_heads=kv_heads,
            head_dim=first.head_dim,
            dtype=dtype,
            device=torch.device(device),
            nonfinite_blocks=torch.zeros(1, dtype=torch.int64, device=device),
        )

    @property
    def num_pages(self) -> int:
        return self.layers[0].key.pages.shape[0]

    @property
    def num_slots(self) -> int:
        return self.layers[0].key.ring.shape[0]

    @property
    def keys(self) -> list[TensorStorage]:
        return [layer.key for layer in self.layers]

    @property
    def values(self) -> list[TensorStorage]:
        return [layer.value for layer in self.layers]

    def page_bytes(self) -> int:
        """Bytes allocated for packed pages, page 0 included."""
        return sum(half.pages.nbytes for half in self.keys + self.values)

    def ring_bytes(self) -> int:
        """Bytes allocated for rings."""
        return sum(half.ring.nbytes for half in self.keys + self.values)

    def sink_bytes(self) -> int:
        """Bytes allocated for sinks."""
        return sum(half.sinks.nbytes for half in self.keys + self.values)
