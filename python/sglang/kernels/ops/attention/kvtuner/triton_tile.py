"""Packed pages in registers, in Triton: a tile of a block dequantized, and the rotation.

Kernels take a :class:`~sglang.srt.kvtuner.format.formats.TensorFormat` as a compile-time constant. A tile is
[reduction, lanes] as in format/layout.py: [channels, tokens] of keys, [tokens, channels] of values, so that both are operands
of tensor cores as they are. Its sides are powers of two; what lies behind head_dim or behind the page is zero.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def log2(n):
    """Of a power of two."""
    return n.bit_length() - 1


@triton.constexpr_function
def padded(n):
    """The smallest power of two that is not below n. (Upstream puts a plain function in triton.next_power_of_2's place, which
    kernels cannot call.)"""
    return 1 << (n - 1).bit_length()


@triton.jit
def code_shifts(SPAN: tl.constexpr, BITS: tl.constexpr):
    """Where in a 32-bit word the elements of a span lie, int32 [SPAN]."""
    e = tl.arange(0, SPAN)
    return 16 * (e & 1) + BITS * (e >> 1)


@triton.jit
def load_tile(block, first, F: tl.constexpr, TOKENS: tl.constexpr):
    """Dequantize tokens [first, first + TOKENS) of a block.

    block: pointer to its first byte, 4-byte aligned. first: a multiple of TOKENS. F: TensorFormat in a vector layout. TOKENS:
    power of two, 16 at least. Returns float32 [channels, TOKENS] for keys, [TOKENS, channels] for values; rotated where the
    format is. A group whose scale is NaN is NaN.
    """
    CHANNELS: tl.constexpr = padded(F.head_dim)
    RED: tl.constexpr = CHANNELS if F.token_lanes else TOKENS
    LANES: tl.constexpr = TOKENS if F.token_lanes else CHANNELS
    PAGE_RED: tl.constexpr = F.head_dim if F.token_lanes else F.page_size
    PAGE_LANES: tl.constexpr = F.page_size if F.token_lanes else F.head_dim
    PADDED: tl.constexpr = F.head_dim != CHANNELS or F.page_size % TOKENS != 0
    SPAN: tl.constexpr = 32 // F.nbits
    red, lane = tl.arange(0, RED), tl.arange(0, LANES)
    span = tl.arange(0, RED // SPAN)
    if F.token_lanes:
        lane += first
    else:
        red += first
        span += first // SPAN
    at = block.to(tl.pointer_type(tl.int32)) + span[:, None] * PAGE_LANES + lane[None, :]
    if PADDED:
        words = tl.load(at, mask=(span * SPAN < PAGE_RED)[:, None] & (lane < PAGE_LANES)[None, :], other=0)
    else:
        words = tl.load(at)
    codes = words[:, None, :] >> code_shifts(SPAN, F.nbits)[None, :, None]
    codes = tl.reshape(codes & ((1 << F.nbits) - 1), (RED, LANES))
    if not F.quantized:
        return (codes << 16).to(tl.float32, bitcast=True)
    x = (codes - (1 << (F.nbits - 1))).to(tl.float32)
    if (F.axis == 0) == F.token_lanes:
        parameter = (red // F.group_size)[:, None] * PAGE_LANES + lane[None, :]
    else:
        parameter = (lane // F.group_size)[None, :] * PAGE_RED + red[:, None]
    scales = (block + F.code_bytes).to(tl.pointer_type(tl.float16))
    zeros = (block + F.code_bytes + F.scale_bytes).to(tl.pointer_type(tl.int16))
    if PADDED:
        inside = (red < PAGE_RED)[:, None] & (lane < PAGE_LANES)[None, :]
        if F.asym:
            x += tl.load(zeros + parameter, mask=inside, other=0).to(tl.float32)
        x *= tl.load(scales + parameter, mask=inside, other=0.0).to(tl.float32)
    else:
        if F.asym:
            x += tl.load(zeros + parameter).to(tl.float32)
        x *= tl.load(scales + parameter).to(tl.float32)
    return x


@triton.jit
def _butterfly(x, HALF: tl.constexpr):
    PAIRS: tl.constexpr = x.shape[0] // (2 * HALF)
    a, b = tl.split(tl.permute(tl.reshape(x, (PAIRS, 2, HALF, x.shape[1])), (0, 2, 3, 1)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 3, 1, 2)), (x.shape[0], x.shape[1]))


@triton.jit
def rotate(x, BLOCK: tl.constexpr):
    """Rotate every BLOCK neighbours along dimension 0 of float32 x, bit for bit as format/hadamard.py does."""
    for i in tl.static_range(log2(BLOCK)):
        x = _butterfly(x, 1 << i)
    return x * (BLOCK**-0.5)
