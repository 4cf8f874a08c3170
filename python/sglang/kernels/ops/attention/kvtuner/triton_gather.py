"""Dequantize what an extend reads of earlier tokens into contiguous rows, in Triton."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.kvtuner.triton_tile import load_tile, padded, rotate


# Compiled once, whatever the lengths of a step are.
@triton.jit(do_not_specialize=["pages_stride", "window", "window_tokens"])
def gather_kernel(
    packed, ring, sinks, slots, prefix_lens, prefix_start, packed_end, pages, pages_stride, window, window_tokens, out,
    F: tl.constexpr, KV_HEADS: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Gather a window of all requests' prefixes, laid end to end. Grid (requests, most tiles of a request in a window,
    KV_HEADS).

    prefix_start: int32 [requests + 1], where in that row each prefix begins. window, window_tokens: its part
    [window, window + window_tokens) is wanted. F: TensorFormat of what is gathered, keys or values. Positions below packed_end
    are dequantized, and rotated back; sinks and those behind come in full precision. Writes out
    [window_tokens, KV_HEADS, head_dim].
    """
    HEAD_DIM: tl.constexpr = F.head_dim
    PAGE: tl.constexpr = F.page_size
    CHANNELS: tl.constexpr = padded(HEAD_DIM)
    TILES: tl.constexpr = (PAGE + TOKENS - 1) // TOKENS
    row, kv_head = tl.program_id(0), tl.program_id(2)
    prefix_len = tl.load(prefix_lens + row)
    begin = tl.load(prefix_start + row) - window
    tile = tl.maximum(-begin, 0) // PAGE * TILES + tl.program_id(1)
    index, first = tile // TILES, tile % TILES * TOKENS
    start = index * PAGE + first
    if (start >= prefix_len) | (begin + start >= window_tokens):
        return
    if F.token_lanes:
        token, channel = tl.arange(0, TOKENS)[None, :], tl.arange(0, CHANNELS)[:, None]
    else:
        token, channel = tl.arange(0, TOKENS)[:, None], tl.arange(0, CHANNELS)[None, :]
    position = start + token
    to = begin + position
    inside = (first + token < PAGE) & (position < prefix_len) & (to >= 0) & (to < window_tokens) & (channel < HEAD_DIM)
    target = out + (to.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM + channel
    if start < tl.load(packed_end + row):
        page = tl.load(pages + row.to(tl.int64) * pages_stride + index).to(tl.int64)
        x = load_tile(packed + (page * KV_HEADS + kv_head) * F.block_bytes, first, F, TOKENS)
        if F.hadamard > 0:
            x = rotate(x, F.hadamard)
        if SINKS > 0:
            if index == 0:
                kept = inside & (position < SINKS)
                at = ((page * SINKS + position) * KV_HEADS + kv_head) * HEAD_DIM + channel
                x = tl.where(kept, tl.load(sinks + at, mask=kept, other=0.0).to(tl.float32), x)
        tl.store(target, x.to(out.dtype.element_ty), mask=inside)
    else:
        slot = tl.load(slots + row).to(tl.int64)
        at = ((slot * RING + position % RING) * KV_HEADS + kv_head) * HEAD_DIM + channel
        tl.store(target, tl.load(ring + at, mask=inside, other=0.0).to(out.dtype.element_ty), mask=inside)
