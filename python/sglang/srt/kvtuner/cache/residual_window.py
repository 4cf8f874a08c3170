"""The residual window: which of a request's newest tokens its ring (storage.py) holds in full precision.

The ring holds what its request computed itself: a prefix taken from the radix cache is only in packed pages, so the first
position in the ring is kept per slot, on the cache's device, and set anew when the slot changes hands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang.srt.kvtuner.cache.host_copy import to_device


class RingOwners:
    """Where each request slot's ring starts.

    start: int32 [slots] on the device, the first position that the slot's ring may be asked for. A slot changes hands when its
    generation in upstream's ReqToTokenPool changes; that needs no call from the scheduler at the end of a request, and holds for
    retraction, abort and cache flush alike. A request's first step under a slot is always an extend, for which upstream has
    slots and prefix lengths on the host: decode never asks the host.
    """

    _NOBODY = -1

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.start = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._generation = [self._NOBODY] * num_slots

    def take_over(
        self, slots: Sequence[int], generations: Sequence[int], prefix_lens: Sequence[int], *, page_size: int
    ) -> None:
        """Note the requests of an extend: a new generation means a new request, whose prefix is what it found in the radix
        cache."""
        fresh = []
        for slot, generation, prefix_len in zip(slots, generations, prefix_lens, strict=True):
            if self._generation[slot] != generation:
                # The prefix cache shares whole pages only; anything else would leave tokens in neither store.
                assert prefix_len % page_size == 0, f"slot {slot} starts in the middle of a page ({prefix_len} tokens)"
                self._generation[slot] = generation
                fresh.append((slot, prefix_len))
        if fresh:
            at, start = to_device(tuple(zip(*fresh, strict=True)), torch.int64, self.start.device)
            self.start.index_copy_(0, at, start.to(torch.int32))
