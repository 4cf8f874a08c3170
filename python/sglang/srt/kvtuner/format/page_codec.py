"""Pages to packed blocks and back, in plain torch: the reference for every kernel.

A block is codes, then scales (float16), then zero points (int16), without padding. Where a code lies is layout.py's matter.
Group parameters are [head_dim / group, page] for axis 0 and [page / group, head_dim] for axis 1: neighbours are what a vector
of the layout needs. 16 bits are bfloat16 values (any other dtype is rounded to it, half to even; NaN is 0x7fc0) without
parameters.

The same in C++: sgl-kernel/include/sgl_kernel/kvtuner/kv_codec.h.
"""

from __future__ import annotations

import torch

from sglang.srt.kvtuner.format.formats import SCALE_DTYPE, ZERO_DTYPE, TensorFormat
from sglang.srt.kvtuner.format.hadamard import rotate
from sglang.srt.kvtuner.format.quantizer import PER_TOKEN, dequantize_groups, quantize


def pack_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Rotate, where the format says so, quantize and pack full-precision pages.

    x: [..., page_size, head_dim], any float dtype. Returns uint8 [..., block_bytes].
    """
    if not fmt.quantized:
        # How torch rounds NaN depends on the machine.
        return fmt.layout.pack_codes(x.to(torch.bfloat16).masked_fill(x.isnan(), torch.nan).contiguous())
    if fmt.hadamard:
        x = rotate(x, fmt.hadamard)
    q = quantize(x, nbits=fmt.nbits, asym=fmt.asym, axis=fmt.axis, group_size=fmt.group_size, scale_dtype=SCALE_DTYPE)
    parts = [fmt.layout.pack_codes(q.codes), _as_bytes(q.scale, fmt)]
    if q.zero is not None:
        parts.append(_as_bytes(q.zero.to(ZERO_DTYPE), fmt))
    return torch.cat(parts, dim=-1)


def unpack_pages(blocks: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Dequantize packed blocks, uint8 [..., block_bytes], and undo their rotation; float32 [..., page_size, head_dim]."""
    if not fmt.quantized:
        return fmt.layout.unpack_codes(blocks).float()
    codes, scale, zero = split_blocks(blocks, fmt)
    x = dequantize_groups(codes, scale, zero, axis=fmt.axis, group_size=fmt.group_size)
    return rotate(x, fmt.hadamard) if fmt.hadamard else x


def has_nonfinite(blocks: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Which packed blocks, uint8 [..., block_bytes], hold values that are NaN or infinite; bool [...]."""
    if not fmt.quantized:
        return ~blocks.contiguous().view(torch.bfloat16).isfinite().all(-1)
    scales = blocks[..., fmt.code_bytes : fmt.code_bytes + fmt.scale_bytes]
    return scales.contiguous().view(SCALE_DTYPE).isnan().any(-1)


def split_blocks(blocks: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 [..., page_size, head_dim], scales float16 and zero points int16 (None when symmetric) of
    quantized blocks."""
    codes, scale, zero = blocks.split([fmt.code_bytes, fmt.scale_bytes, fmt.zero_bytes], dim=-1)
    return (
        fmt.layout.unpack_codes(codes),
        _from_bytes(scale, SCALE_DTYPE, fmt),
        _from_bytes(zero, ZERO_DTYPE, fmt) if fmt.asym else None,
    )


def _as_bytes(parameters: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    if fmt.axis == PER_TOKEN:
        parameters = parameters.transpose(-1, -2)
    return parameters.flatten(-2).contiguous().view(torch.uint8)


def _from_bytes(raw: torch.Tensor, dtype: torch.dtype, fmt: TensorFormat) -> torch.Tensor:
    parameters = raw.contiguous().view(dtype)
    if fmt.axis == PER_TOKEN:
        return parameters.unflatten(-1, fmt.parameter_shape[::-1]).transpose(-1, -2)
    return parameters.unflatten(-1, fmt.parameter_shape)
