"""Buffers of the cache, on the CPU in huge pages.

Attention reads the packed cache in blocks of a few KiB in random order, so that with ordinary pages nearly every block
misses the processor's address translation; with huge pages decode over a large cache takes about half the time.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys

import torch

logger = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # linux/mman.h
_CACHE_LINE = 64


def zeros(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """One zeroed tensor per shape.

    On the CPU they share one allocation, so that small ones get huge pages too; each starts at a cache line.
    """
    if torch.device(device).type != "cpu":
        return [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
    rooms = [-(-size // _CACHE_LINE) * _CACHE_LINE for size in sizes]
    # torch.zeros would touch the memory, which settles what pages it gets, before the advice.
    arena = torch.empty(sum(rooms), dtype=torch.uint8)
    _advise_huge_pages(arena)
    arena.zero_()
    parts = arena.split(rooms)
    return [part[:size].view(dtype).view(shape) for part, size, shape in zip(parts, sizes, shapes, strict=True)]


def _advise_huge_pages(t: torch.Tensor) -> None:
    """Ask the kernel for huge pages; where it has none (another system, switched off) nothing changes."""
    if not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # Only whole huge pages inside the tensor: what lies around belongs to others.
    start = -(-t.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (t.data_ptr() + t.nbytes) // _HUGE_PAGE * _HUGE_PAGE
    if end > start and madvise(start, end - start, _MADV_HUGEPAGE):
        logger.debug("No huge pages for the KV cache: error %d", ctypes.get_errno())
