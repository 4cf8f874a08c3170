"""Storing a step in Triton: pack the pages that it completes, keep its newest tokens in the rings."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.kvtuner.triton_pack import pack_tile
from sglang.kernels.ops.attention.kvtuner.triton_tile import padded


# Compiled once, whatever the lengths of a step are.
@triton.jit(do_not_specialize=["pages_stride"])
def store_pages_kernel(
    k, k_row, k_head, v, v_row, v_head, key_pages, value_pages, key_ring, value_ring, key_sinks, value_sinks,
    slots, query_start, prefix_lens, pages, pages_stride,
    K: tl.constexpr, V: tl.constexpr, KV_HEADS: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Pack the pages that a step completes, with the sinks of first pages. Grid (requests, most pages of a request,
    KV_HEADS of K, then of V).

    k, v: [tokens, KV_HEADS, head_dim] in the ring's dtype. DECODE: every request has one token, which is stored in its ring as
    well: packing reads other rows of the ring. Buffers as in cache/storage.py, the plan as in attention/steps.py.
    """
    kv_head = tl.program_id(2)
    if kv_head < KV_HEADS:
        _store_half(
            k, k_row, k_head, key_pages, key_ring, key_sinks, slots, query_start, prefix_lens, pages, pages_stride,
            kv_head, K, KV_HEADS, RING, SINKS, DECODE,
        )  # fmt: skip
    else:
        _store_half(
            v, v_row, v_head, value_pages, value_ring, value_sinks, slots, query_start, prefix_lens, pages, pages_stride,
            kv_head - KV_HEADS, V, KV_HEADS, RING, SINKS, DECODE,
        )  # fmt: skip


@triton.jit
def _store_half(
    x, x_row, x_head, packed, ring, sinks, slots, query_start, prefix_lens, pages, pages_stride, kv_head,
    F: tl.constexpr, KV_HEADS: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    CHANNELS: tl.constexpr = padded(F.head_dim)
    TOKENS: tl.constexpr = padded(F.page_size)
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    prefix_len = tl.load(prefix_lens + row)
    start = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - start
    if DECODE:
        c = tl.arange(0, CHANNELS)
        own = tl.load(x + start.to(tl.int64) * x_row + kv_head * x_head + c, mask=c < F.head_dim, other=0.0)
        kept = ring + ((slot * RING + prefix_len % RING) * KV_HEADS + kv_head) * F.head_dim
        tl.store(kept + c, own, mask=c < F.head_dim)
    index = prefix_len // F.page_size + tl.program_id(1)
    first = index * F.page_size
    if first + F.page_size <= prefix_len + count:
        page = tl.load(pages + row.to(tl.int64) * pages_stride + index).to(tl.int64)
        token, channel = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
        if F.token_lanes:
            token, channel = token[None, :], channel[:, None]
        else:
            token, channel = token[:, None], channel[None, :]
        inside = (token < F.page_size) & (channel < F.head_dim)
        position = first + token
        earlier = position < prefix_len
        old = ring + ((slot * RING + position % RING) * KV_HEADS + kv_head) * F.head_dim + channel
        new = x + (start + position - prefix_len).to(tl.int64) * x_row + kv_head * x_head + channel
        tile = tl.where(
            earlier,
            tl.load(old, mask=inside & earlier, other=0.0),
            tl.load(new, mask=inside & (position >= prefix_len), other=0.0),
        )
        if SINKS > 0:
            if index == 0:
                sink = sinks + ((page * SINKS + token) * KV_HEADS + kv_head) * F.head_dim + channel
                tl.store(sink, tile, mask=inside & (token < SINKS))
        pack_tile(tile, packed + (page * KV_HEADS + kv_head) * F.block_bytes, F)


@triton.jit
def store_rows_kernel(
    k, k_row, k_head, v, v_row, v_head, key_ring, value_ring, slots, query_start, prefix_lens,
    HEAD_DIM: tl.constexpr, KV_HEADS: tl.constexpr, RING: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Keep the newest tokens of an extend in the rings. Grid (requests, blocks of TOKENS up to RING, KV_HEADS of K, then of
    V); comes after the launch that packs: a long chunk overwrites rows that packing reads."""
    row, z = tl.program_id(0), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    prefix_len = tl.load(prefix_lens + row)
    start = tl.load(query_start + row)
    count = tl.load(query_start + row + 1) - start
    token = tl.maximum(count - RING, 0) + tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, padded(HEAD_DIM))[None, :]
    inside = (token < count)[:, None] & (channel < HEAD_DIM)
    kv_head = z % KV_HEADS
    at = (((slot * RING + (prefix_len + token) % RING) * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + channel
    source = (start + token).to(tl.int64)[:, None]
    if z < KV_HEADS:
        tl.store(key_ring + at, tl.load(k + source * k_row + kv_head * k_head + channel, mask=inside), mask=inside)
    else:
        tl.store(value_ring + at, tl.load(v + source * v_row + kv_head * v_head + channel, mask=inside), mask=inside)
