"""The residual window: which of a request's newest tokens its ring (storage.py) holds in full precision.

The ring holds what its request computed itself: a prefix taken from the radix cache is only in packed pages, so the first
position in the ring is kept per slot and set anew when the slot changes hands.
"""

from __future__ import annotations


class RingLedger:
    """Which positions each request slot's ring may be asked for. Host-side bookkeeping, no device access.

    A slot changes hands when its generation in upstream's ReqToTokenPool changes; that needs no call from the
    scheduler at the end of a request, and holds for retraction, abort and cache flush alike.
    """

    _NOBODY = -1

    def __init__(self, num_slots: int) -> None:
        self._generation = [self._NOBODY] * num_slots
        self._start = [0] * num_slots

    def start(self, slot: int, generation: int, prefix_len: int) -> int:
        """First position that the ring of ``slot`` holds, given ``prefix_len`` tokens before this step.

        A new generation means a new request, whose ``prefix_len`` tokens are the prefix it found in the radix cache.
        """
        if self._generation[slot] != generation:
            self._generation[slot] = generation
            self._start[slot] = prefix_len
        return self._start[slot]
