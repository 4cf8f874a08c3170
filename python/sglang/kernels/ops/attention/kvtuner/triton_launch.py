"""How the Triton kernels are launched: tiles, warps and stages, for the product and for the table of what they need."""

from __future__ import annotations

from typing import Any

# Compiled at a time: num_stages 2 would copy every gather of scales through shared memory, of which one block per
# multiprocessor is left on sm_89.
ATTEND: dict[str, Any] = {"num_warps": 8, "num_stages": 1}
GATHER: dict[str, Any] = {"num_warps": 4, "num_stages": 1}
# Pages whose ids a program of the plan writes; tokens that a program moves into a ring.
PLAN_PAGES = 128
ROW_TOKENS = 16
# Elements of a tile that attention or gathering dequantizes at once.
_TILE_ELEMENTS = 8192


def padded(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def tile_tokens(page_size: int, head_dim: int) -> int:
    """Tokens of a tile: a page where it is not too large, a power of two of 16 at least."""
    return max(16, min(padded(page_size), _TILE_ELEMENTS // padded(head_dim)))


def pack_options(page_size: int, head_dim: int) -> dict[str, Any]:
    """A program packs a page as a whole; about 64 elements per thread stay in registers."""
    warps = padded(page_size) * padded(head_dim) // (64 * 32)
    # Contracted multiply-adds would round differently from the reference quantizer.
    return {"num_warps": min(max(warps, 4), 16), "enable_fp_fusion": False}
