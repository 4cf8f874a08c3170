"""Huge pages for buffers on the CPU.

Attention reads the packed cache in blocks of a few KiB in random order, so that with ordinary pages nearly every block
misses the processor's address translation; with huge pages decode over a large cache takes about half the time.
"""

from __future__ import annotations

import ctypes
import logging
import sys

import torch

logger = logging.getLogger(__name__)

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # linux/mman.h


def advise_huge_pages(tensors: list[torch.Tensor]) -> bool:
    """Ask the kernel to back contiguous CPU tensors with huge pages, best before they are first written.

    Returns whether it agreed to all; where it cannot (another system, huge pages switched off) nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    agreed = True
    for t in tensors:
        # Only whole huge pages inside the tensor: what lies around belongs to others.
        start = -(-t.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        end = (t.data_ptr() + t.nbytes) // _HUGE_PAGE * _HUGE_PAGE
        if end > start and madvise(start, end - start, _MADV_HUGEPAGE):
            agreed = False
            logger.debug("No huge pages for the KV cache: error %d", ctypes.get_errno())
    return agreed
