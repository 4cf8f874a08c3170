"""How the Triton kernels are launched: tiles, warps and stages, for the product and for the table of what they need."""

from __future__ import annotations

from typing import Any

# A bound on registers, so that ptxas does not spill a few of them to fit one block more.
GATHER: dict[str, Any] = {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
# Pages whose ids a program of the plan writes; tokens that a program moves into a ring.
PLAN_PAGES = 128
ROW_TOKENS = 16
# Bytes of a tile's rows, dequantized to the model's dtype, that attention or gathering takes at once.
_TILE_BYTES = 16384


def padded(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def tile_tokens(page_size: int, head_dim: int, itemsize: int) -> int:
    """Tokens of a tile: a page where it is not too large, a power of two of 16 at least."""
    return max(16, min(padded(page_size), _TILE_BYTES // itemsize // padded(head_dim)))


def attend_options(head_dim: int) -> dict[str, Any]:
    """Two blocks for a multiprocessor's registers, one for heads above 128.

    Two stages would copy every gather of scales through shared memory, which leaves room for one block on sm_89.
    """
    return {"num_warps": 8, "num_stages": 1, "maxnreg": 128 if head_dim <= 128 else 255}


def pack_options(page_size: int, head_dim: int) -> dict[str, Any]:
    """A program packs a page as a whole, in registers."""
    elements = padded(page_size) * padded(head_dim)
    warps = 4 if elements <= 8192 else 8 if page_size <= 64 else 16
    # Contracted multiply-adds would round differently from the reference quantizer.
    return {"num_warps": warps, "enable_fp_fusion": False}
