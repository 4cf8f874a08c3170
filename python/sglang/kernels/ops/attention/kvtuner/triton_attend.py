"""Split-KV attention of a decode step over the packed cache, in Triton (Flash-Decoding; FlashAttention-2, ICLR 2024, for the
running softmax)."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.kvtuner.triton_tile import load_tile, padded, rotate


# Compiled once, whatever the lengths of a step are.
@triton.jit(do_not_specialize=["pages_stride"])
def attend_decode_kernel(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head,
    key_pages, value_pages, key_ring, value_ring, key_sinks, value_sinks,
    slots, prefix_lens, packed_end, pages, pages_stride, part_out, part_lse, scaling,
    K: tl.constexpr, V: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, RING: tl.constexpr, SINKS: tl.constexpr,
    SPLITS: tl.constexpr, TOKENS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attention of one token per request. Grid (requests, KV_HEADS * blocks of 16 query heads, SPLITS + 1).

    The splits share the packed pages; the last program has what is in full precision: the step's own token, sinks, the ring.
    q: [requests, HEADS, head_dim], k and v: [requests, KV_HEADS, head_dim], rows and heads as far apart as the arguments say.
    The cache's buffers are those of cache/storage.py, the plan's tensors those of attention/steps.py. K, V: TensorFormats.
    TOKENS: of a tile, a power of two of 16 at least. DOT: dtype of matrix products. Writes part_out float32
    [requests, HEADS, SPLITS + 1, head_dim] and part_lse float32 [requests, HEADS, SPLITS + 1], to base 2.
    """
    HEAD_DIM: tl.constexpr = K.head_dim
    CHANNELS: tl.constexpr = padded(HEAD_DIM)
    PAGE: tl.constexpr = K.page_size
    GROUP: tl.constexpr = HEADS // KV_HEADS
    BLOCKS: tl.constexpr = (GROUP + 15) // 16
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    kv_head = tl.program_id(1) // BLOCKS
    of_group = tl.program_id(1) % BLOCKS * 16 + tl.arange(0, 16)
    head = kv_head * GROUP + of_group
    channel = tl.arange(0, CHANNELS)
    token = tl.arange(0, TOKENS)
    inside = (of_group < GROUP)[:, None] & (channel < HEAD_DIM)[None, :]
    query = tl.load(q + row * q_row + head[:, None] * q_head + channel[None, :], mask=inside, other=0.0)
    slot = tl.load(slots + row).to(tl.int64)
    prefix_len = tl.load(prefix_lens + row)
    end = tl.load(packed_end + row)
    LOG2_E: tl.constexpr = 1.4426950408889634
    scale = scaling * LOG2_E
    if split < SPLITS:
        top = tl.full((16,), float("-inf"), tl.float32)
        total = tl.zeros((16,), tl.float32)
        result = tl.zeros((16, CHANNELS), tl.float32)
        TILES: tl.constexpr = (PAGE + TOKENS - 1) // TOKENS
        tiles = end // PAGE * TILES
        share = tl.cdiv(tiles, SPLITS)
        of_pages = query.to(tl.float32)
        if K.hadamard > 0:
            of_pages = tl.trans(rotate(tl.trans(of_pages), K.hadamard))
        of_pages = of_pages.to(DOT)
        for tile in range(split * share, tl.minimum((split + 1) * share, tiles)):
            index, first = tile // TILES, tile % TILES * TOKENS
            page = tl.load(pages + row * pages_stride + index).to(tl.int64) * KV_HEADS + kv_head
            seen = first + token < PAGE
            if SINKS > 0:
                seen = seen & ((index > 0) | (first + token >= SINKS))
            keys = load_tile(key_pages + page * K.block_bytes, first, K, TOKENS)
            values = load_tile(value_pages + page * V.block_bytes, first, V, TOKENS)
            top, total, result = _attend_tile(of_pages, keys, values, seen, scale, top, total, result, DOT)
    else:
        own_key = tl.load(k + row * k_row + kv_head * k_head + channel, mask=channel < HEAD_DIM, other=0.0)
        own_value = tl.load(v + row * v_row + kv_head * v_head + channel, mask=channel < HEAD_DIM, other=0.0)
        top = tl.sum(query.to(tl.float32) * own_key.to(tl.float32)[None, :], 1) * scale
        total = tl.full((16,), 1.0, tl.float32)
        result = tl.zeros((16, CHANNELS), tl.float32) + own_value.to(tl.float32)[None, :]
        sinks = 0
        key_rows = key_ring + (slot * RING * KV_HEADS + kv_head) * HEAD_DIM
        value_rows = value_ring + (slot * RING * KV_HEADS + kv_head) * HEAD_DIM
        if SINKS > 0:
            sinks = tl.where(end > 0, SINKS, 0)
            page = tl.load(pages + row * pages_stride, mask=end > 0, other=0).to(tl.int64)
            key_sinks += (page * SINKS * KV_HEADS + kv_head) * HEAD_DIM
            value_sinks += (page * SINKS * KV_HEADS + kv_head) * HEAD_DIM
        count = sinks + prefix_len - end
        for first in range(0, count, TOKENS):
            index = first + token
            seen = index < count
            offset = (end + index - sinks) % RING * (KV_HEADS * HEAD_DIM)
            keys, values = _load_rows(key_rows, value_rows, offset, seen & (index >= sinks), HEAD_DIM)
            if SINKS > 0:
                offset = index * (KV_HEADS * HEAD_DIM)
                more_keys, more_values = _load_rows(key_sinks, value_sinks, offset, index < sinks, HEAD_DIM)
                keys = tl.where((index < sinks)[None, :], more_keys, keys)
                values = tl.where((index < sinks)[:, None], more_values, values)
            top, total, result = _attend_tile(query.to(DOT), keys, values, seen, scale, top, total, result, DOT)
    # A part without keys has a sum of zero. One that is NaN compares equal to nothing and stays NaN.
    empty = total == 0.0
    part = (row * HEADS + head) * (SPLITS + 1) + split
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(part_lse + part, lse, mask=of_group < GROUP)
    result = result / tl.where(empty, 1.0, total)[:, None]
    tl.store(part_out + part[:, None] * HEAD_DIM + channel[None, :], result, mask=inside)


@triton.jit
def _load_rows(keys, values, offset, valid, HEAD_DIM: tl.constexpr):
    """Full-precision rows that begin at the elements ``offset`` [tokens]: keys [channels, tokens], values [tokens, channels]."""
    channel = tl.arange(0, padded(HEAD_DIM))
    has = channel < HEAD_DIM
    k = tl.load(keys + offset[None, :] + channel[:, None], mask=has[:, None] & valid[None, :], other=0.0)
    v = tl.load(values + offset[:, None] + channel[None, :], mask=valid[:, None] & has[None, :], other=0.0)
    return k, v


@triton.jit
def _attend_tile(q, k, v, seen, scale, top, total, result, DOT: tl.constexpr):
    """One step of the running softmax to base 2. q [heads, channels], k [channels, tokens], v [tokens, channels]."""
    logits = tl.dot(q, k.to(DOT), input_precision="ieee", out_dtype=tl.float32) * scale
    logits = tl.where(seen[None, :], logits, float("-inf"))
    highest = tl.maximum(top, tl.max(logits, 1))
    finite = tl.where(highest == float("-inf"), 0.0, highest)
    weight = tl.exp2(logits - finite[:, None])
    earlier = tl.exp2(top - finite)
    total = total * earlier + tl.sum(weight, 1)
    result = tl.dot(weight.to(DOT), v.to(DOT), result * earlier[:, None], input_precision="ieee", out_dtype=tl.float32)
    return highest, total, result
