"""Parts of an attention, each over some of the keys, merged by their log-sum-exp (LSE), in Triton (FlashInfer, MLSys 2025,
section 2.2). A NaN in any part is one in the result."""

import triton
import triton.language as tl

from sglang.kernels.ops.attention.kvtuner.triton_tile import padded


@triton.jit
def merge_splits_kernel(part_out, part_lse, out, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr):
    """Merge the splits of a decode step. Grid (requests * heads,).

    part_out: float32 [requests * heads, PARTS, HEAD_DIM]. part_lse: float32 [requests * heads, PARTS] to base 2, -inf for a part
    without keys; one part at least has some. out: [requests * heads, HEAD_DIM], any float dtype.
    """
    CHANNELS: tl.constexpr = padded(HEAD_DIM)
    row = tl.program_id(0).to(tl.int64)
    part, channel = tl.arange(0, padded(PARTS)), tl.arange(0, CHANNELS)
    lse = tl.load(part_lse + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    at = part_out + (row * PARTS + part)[:, None] * HEAD_DIM + channel[None, :]
    x = tl.load(at, mask=(part < PARTS)[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    merged = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * HEAD_DIM + channel, merged.to(out.dtype.element_ty), mask=channel < HEAD_DIM)


@triton.jit
def merge_into_kernel(out, lse, part_out, part_lse, HEAD_DIM: tl.constexpr):
    """Merge a part into what ``out`` and ``lse`` hold of others. Grid (rows * heads,).

    out: [rows * heads, HEAD_DIM], any float dtype. part_out: float32 of that shape. lse, part_lse: float32 [rows * heads],
    natural logarithms, -inf for a part without keys; out has some.
    """
    CHANNELS: tl.constexpr = padded(HEAD_DIM)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    inside = channel < HEAD_DIM
    a, b = tl.load(lse + row), tl.load(part_lse + row)
    top = tl.maximum(a, b)
    weight_a, weight_b = tl.exp(a - top), tl.exp(b - top)
    total = weight_a + weight_b
    x = tl.load(out + row * HEAD_DIM + channel, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(part_out + row * HEAD_DIM + channel, mask=inside, other=0.0)
    merged = (x * weight_a + y * weight_b) / total
    tl.store(out + row * HEAD_DIM + channel, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + row, top + tl.log(total))
