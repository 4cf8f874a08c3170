"""Small formats and a stand-in for upstream's request table, for tests of the cache without a model."""

from dataclasses import replace

import torch

from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat


def mixed_format(page_size=16, residual=16, layers=4, head_dim=16, sinks=0):
    """A cache format whose layers differ in bits, axis, group and rotation, as a preset's do and more; every second layer keeps
    ``sinks``."""

    def tensor(nbits, axis, group, asym, hadamard=0, token_lanes=True):
        return TensorFormat(nbits, asym, axis, group, page_size, head_dim, token_lanes, hadamard)

    formats = [
        LayerFormat(tensor(8, 0, head_dim, False), tensor(4, 1, 16, False, token_lanes=False)),
        LayerFormat(tensor(4, 1, page_size, True, hadamard=16), tensor(2, 0, 8, True, token_lanes=False)),
        LayerFormat(tensor(2, 0, 4, False), TensorFormat.unquantized(page_size, head_dim)),
    ]
    chosen = tuple(replace(formats[i % len(formats)], sink_length=sinks * (i % 2)) for i in range(layers))
    return CacheFormat(layers=chosen, page_size=page_size, residual_length=residual)


class RequestTable:
    """What the cache reads of upstream's ReqToTokenPool, with pages of tokens handed out in random order.

    Slot 0 and page 0 are padding, as upstream has them. ``pages[slot]`` are the pages of the slot's request.
    """

    def __init__(self, page_size, num_slots=4, num_pages=64, max_pages=32, seed=0):
        self.page_size = page_size
        self.req_to_token = torch.zeros(num_slots, max_pages * page_size, dtype=torch.int32)
        self.req_generation = torch.zeros(num_slots, dtype=torch.int64)
        self.pages = {slot: [] for slot in range(num_slots)}
        generator = torch.Generator().manual_seed(seed)
        self._free = (1 + torch.randperm(num_pages - 1, generator=generator)).tolist()

    def begin(self, slot, prefix_pages=()):
        """Give the slot to a new request that found ``prefix_pages`` in the prefix cache."""
        self.req_generation[slot] += 1
        self.req_to_token[slot] = 0
        self.pages[slot] = []
        for page in prefix_pages:
            self._append(slot, page)

    def extend(self, slot, length):
        """Make room for ``length`` tokens in all."""
        while len(self.pages[slot]) * self.page_size < length:
            self._append(slot, self._free.pop())

    def free(self, pages):
        """Return pages; the next request gets the ones that were returned last."""
        self._free.extend(pages)

    def _append(self, slot, page):
        start = len(self.pages[slot]) * self.page_size
        tokens = torch.arange(page * self.page_size, (page + 1) * self.page_size, dtype=torch.int32)
        self.req_to_token[slot, start : start + self.page_size] = tokens
        self.pages[slot].append(page)
