"""Quantize and pack whole pages, in Triton: the bytes that format/page_codec.py defines."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.kvtuner.triton_tile import code_shifts, padded, rotate


@triton.constexpr_function
def power_of_two_in(n):
    """The largest power of two that divides n."""
    return n & -n


@triton.jit
def pack_pages_kernel(x, blocks, F: tl.constexpr):
    """Pack x [pages, page_size, head_dim], any float dtype, into blocks uint8 [pages, block_bytes]. Grid (pages,)."""
    CHANNELS: tl.constexpr = padded(F.head_dim)
    TOKENS: tl.constexpr = padded(F.page_size)
    page = tl.program_id(0).to(tl.int64)
    token, channel = tl.arange(0, TOKENS), tl.arange(0, CHANNELS)
    if F.token_lanes:
        token, channel = token[None, :], channel[:, None]
    else:
        token, channel = token[:, None], channel[None, :]
    at = x + page * (F.page_size * F.head_dim) + token * F.head_dim + channel
    tile = tl.load(at, mask=(token < F.page_size) & (channel < F.head_dim), other=0.0)
    pack_tile(tile, blocks + page * F.block_bytes, F)


@triton.jit
def pack_tile(x, block, F: tl.constexpr):
    """Rotate, quantize and pack one page of one head.

    x: float of any width, [channels, tokens] for keys, [tokens, channels] for values, the whole page, zeros behind it up to powers of two.
    block: pointer to the first of its bytes, 4-byte aligned. F: TensorFormat in a vector layout. Returns 1 where an element was
    NaN or infinite, 0 elsewhere.
    """
    RED: tl.constexpr = x.shape[0]
    LANES: tl.constexpr = x.shape[1]
    PAGE_RED: tl.constexpr = F.head_dim if F.token_lanes else F.page_size
    PAGE_LANES: tl.constexpr = F.page_size if F.token_lanes else F.head_dim
    SPAN: tl.constexpr = 32 // F.nbits
    if x.dtype == tl.bfloat16:
        # On the bits, since Triton's interpreter loses subnormal numbers.
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        x = x.to(tl.float32)
    if F.quantized:
        if F.hadamard > 0:
            x = rotate(x, F.hadamard)
        codes, nonfinite = _quantize(x, block, F, PAGE_RED, PAGE_LANES)
    else:
        codes = _bfloat16_bits(x)
        nonfinite = tl.max(tl.where((codes & 0x7F80) == 0x7F80, 1, 0))
    span, lane = tl.arange(0, RED // SPAN), tl.arange(0, LANES)
    parts = tl.reshape(codes, (RED // SPAN, SPAN, LANES)) << code_shifts(SPAN, F.nbits)[None, :, None]
    at = block.to(tl.pointer_type(tl.int32)) + span[:, None] * PAGE_LANES + lane[None, :]
    tl.store(at, tl.sum(parts, 1), mask=(span * SPAN < PAGE_RED)[:, None] & (lane < PAGE_LANES)[None, :])
    return nonfinite


@triton.jit
def _bfloat16_bits(x):
    """Rounded half to even, on the bits, since Triton's interpreter truncates; a NaN stays one."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded) & 0xFFFF


@triton.jit
def _quantize(x, block, F: tl.constexpr, PAGE_RED: tl.constexpr, PAGE_LANES: tl.constexpr):
    """Store scales and zero points of the page's groups; returns offset-binary codes, int32 of x's shape, and 1 where one of x was
    NaN or infinite, 0 elsewhere.

    Tiles split into powers of two alone, so that a group of 48 is three parts of 16: each part is reduced, then the parts of a
    group exchange what they found.
    """
    # Within the function: Triton compares a kernel's globals in every launch, which takes the host a microsecond for each.
    FLOAT32_MAX: tl.constexpr = 3.4028234663852886e38
    FLOAT16_MAX: tl.constexpr = 65504.0
    FLOAT16_STEP: tl.constexpr = 2.0**-24  # the smallest positive one
    FLOAT16_NAN: tl.constexpr = 0x7E00
    # As in format/quantizer.py.
    RANGE_FLOOR: tl.constexpr = 1e-5
    MAX_STORED_ZERO: tl.constexpr = 32000.0
    RED: tl.constexpr = x.shape[0]
    LANES: tl.constexpr = x.shape[1]
    ALONG_RED: tl.constexpr = (F.axis == 0) == F.token_lanes
    PART: tl.constexpr = power_of_two_in(F.group_size)
    PARTS: tl.constexpr = F.group_size // PART
    AXIS: tl.constexpr = 0 if ALONG_RED else 1  # of the parts
    Q_MAX: tl.constexpr = (1 << (F.nbits - 1)) - 1
    Q_MIN: tl.constexpr = -(1 << (F.nbits - 1))
    if ALONG_RED:
        parts = tl.reshape(x, (RED // PART, PART, LANES))
        i, j = tl.arange(0, RED // PART)[:, None], tl.arange(0, LANES)[None, :]
        group, parameter = i, i // PARTS * PAGE_LANES + j
        inside = (i * PART < PAGE_RED) & (j < PAGE_LANES)
    else:
        parts = tl.reshape(x, (RED, LANES // PART, PART))
        i, j = tl.arange(0, RED)[:, None], tl.arange(0, LANES // PART)[None, :]
        group, parameter = j, j // PARTS * PAGE_RED + i
        inside = (i < PAGE_RED) & (j * PART < PAGE_LANES)
    inside = inside & (group % PARTS == 0)
    scales = (block + F.code_bytes).to(tl.pointer_type(tl.int16))

    infinite = tl.where(tl.abs(parts) <= FLOAT32_MAX, 0, 1)  # NaN too: it is not less than anything
    broken = _share_max(tl.max(infinite, AXIS + 1), PARTS, AXIS) != 0
    parts = tl.where(tl.expand_dims(broken, AXIS + 1), 0.0, parts)
    if F.asym:
        low = -_share_max(-tl.min(parts, AXIS + 1), PARTS, AXIS)
        high = _share_max(tl.max(parts, AXIS + 1), PARTS, AXIS)
        scale = _divide_by(tl.maximum(high - low, RANGE_FLOOR), Q_MAX - Q_MIN)
        scale = tl.maximum(scale, _divide_by(tl.abs(low), MAX_STORED_ZERO) + FLOAT16_STEP / 2)
    else:
        high = _share_max(tl.max(tl.abs(parts), AXIS + 1), PARTS, AXIS)
        scale = _divide_by(tl.maximum(high, RANGE_FLOOR), Q_MAX)
    stored = tl.minimum(tl.maximum(scale, FLOAT16_STEP), FLOAT16_MAX).to(tl.float16)
    tl.store(scales + parameter, tl.where(broken, FLOAT16_NAN, stored.to(tl.int16, bitcast=True)).to(tl.int16), inside)
    scale = stored.to(tl.float32)
    codes = _divide(parts, tl.expand_dims(scale, AXIS + 1))
    if F.asym:
        # Clamped before it is rounded as well, to where rounding is exact.
        offset = tl.minimum(tl.maximum(tl.div_rn(low, scale), -40000.0), 40000.0)
        zero = tl.minimum(tl.maximum(_round(offset) - Q_MIN, -32768.0), 32767.0)
        tl.store(scales + F.scale_bytes // 2 + parameter, tl.where(broken, 0.0, zero).to(tl.int16), inside)
        codes -= tl.expand_dims(zero, AXIS + 1)
    codes = _round(tl.minimum(tl.maximum(codes, Q_MIN - 1.0), Q_MAX + 1.0))
    codes = tl.minimum(tl.maximum(codes, Q_MIN), Q_MAX)
    codes = tl.where(tl.expand_dims(broken, AXIS + 1), 0.0, codes)
    return tl.reshape(codes, (RED, LANES)).to(tl.int32) - Q_MIN, tl.max(broken.to(tl.int32))


@triton.jit
def _share_max(x, COUNT: tl.constexpr, AXIS: tl.constexpr):
    """In the place of every element of x [n, m] the maximum of those COUNT neighbours along AXIS that it is one of."""
    if COUNT == 1:
        return x
    else:
        i = tl.arange(0, x.shape[AXIS])
        first = tl.expand_dims(i // COUNT * COUNT, 1 - AXIS)
        highest = x
        for j in tl.static_range(COUNT):
            at = tl.broadcast_to(tl.minimum(first + j, x.shape[AXIS] - 1), x.shape)
            highest = tl.maximum(highest, tl.gather(x, at, AXIS))
        return highest


@triton.jit
def _divide(x, y):
    """Rounded to nearest, which a plain division on a GPU is not."""
    return tl.div_rn(x, tl.broadcast_to(y, x.shape))


@triton.jit
def _divide_by(x, Y: tl.constexpr):
    return tl.div_rn(x, tl.full(x.shape, Y, tl.float32))


@triton.jit
def _round(x):
    """Half to even, for |x| up to 2^22."""
    return (x + 12582912.0) - 12582912.0
