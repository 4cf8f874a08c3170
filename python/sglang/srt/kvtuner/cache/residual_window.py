"""The residual window: a ring per request slot that holds the newest tokens in full precision.

Position p of the request in slot s lives in row ``p % ring_length`` of ring s. The ring holds what its request
computed itself: a prefix taken from the radix cache is only in packed pages, so the first position in the ring is
kept per slot and set anew when the slot changes hands.
"""

from __future__ import annotations

import torch

from sglang.srt.kvtuner.cache import huge_pages
from sglang.srt.kvtuner.config.cache_format import CacheFormat


class RingLedger:
    """Which positions each request slot's ring may be asked for. Host-side bookkeeping, no device access.

    A slot changes hands when its generation in upstream's ReqToTokenPool changes; that needs no call from the
    scheduler at the end of a request, and holds for retraction, abort and cache flush alike.
    """

    _NOBODY = -1

    def __init__(self, num_slots: int) -> None:
        self._generation = [self._NOBODY] * num_slots
        self._start = [0] * num_slots

    def start(self, slot: int, generation: int, prior: int) -> int:
        """First position that the ring of ``slot`` holds, given ``prior`` tokens before this step.

        A new generation means a new request, whose ``prior`` tokens are the prefix it found in the radix cache.
        """
        if self._generation[slot] != generation:
            self._generation[slot] = generation
            self._start[slot] = prior
        return self._start[slot]


class ResidualWindow:
    """Full-precision rings of all layers.

    keys, values: per layer [num_slots, ring_length, kv_heads, head_dim] in the model's dtype.
    """

    def __init__(
        self,
        cache_format: CacheFormat,
        *,
        num_layers: int,
        num_slots: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        self.length = cache_format.ring_length
        self.ledger = RingLedger(num_slots)
        shapes = [(num_slots, self.length, kv_heads, head_dim)] * num_layers
        self.keys = huge_pages.zeros(shapes, dtype, device)
        self.values = huge_pages.zeros(shapes, dtype, device)

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Ring rows of positions [start, end), int64 on the host; at most ``length`` of them."""
        assert end - start <= self.length, (start, end, self.length)
        return torch.arange(start, end) % self.length

    def size_bytes(self) -> int:
        """Bytes allocated for all rings."""
        return sum(t.nbytes for t in (*self.keys, *self.values))
