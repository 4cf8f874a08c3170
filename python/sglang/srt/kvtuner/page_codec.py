"""Pages to packed blocks and back, in plain torch: the reference for every kernel.

Block layout (bytes): codes [page, head_dim * bits / 8] as in packing.py, scales float16 and zero points int16 in the
shape of ``TensorFormat.parameter_shape``, all row-major and without padding.
"""

from __future__ import annotations

import torch

from sglang.srt.kvtuner.formats import SCALE_DTYPE, ZERO_DTYPE, TensorFormat
from sglang.srt.kvtuner.packing import pack, unpack
from sglang.srt.kvtuner.quantizer import dequantize_groups, quantize


def encode_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Quantize and pack full-precision pages.

    x: [..., page_size, head_dim], any float dtype. Returns uint8 [..., block_bytes].
    """
    q = quantize(
        x, nbits=fmt.nbits, asym=fmt.asym, axis=fmt.axis, group_size=fmt.group_size, scale_dtype=SCALE_DTYPE
    )
    parts = [pack(q.codes, fmt.nbits).flatten(-2), _as_bytes(q.scale)]
    if q.zero is not None:
        parts.append(_as_bytes(q.zero.to(ZERO_DTYPE)))
    return torch.cat(parts, dim=-1)


def decode_pages(blocks: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Dequantize packed blocks, uint8 [..., block_bytes], to float32 [..., page_size, head_dim]."""
    codes, scale, zero = split_blocks(blocks, fmt)
    return dequantize_groups(codes, scale, zero, axis=fmt.axis, group_size=fmt.group_size)


def split_blocks(
    blocks: torch.Tensor, fmt: TensorFormat
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 [..., page_size, head_dim], scales float16 and zero points int16 (None when symmetric) of blocks."""
    widths = [fmt.code_bytes, fmt.scale_bytes, fmt.zero_bytes]
    code_bytes, scale_bytes, zero_bytes = blocks.split(widths, dim=-1)
    codes = unpack(code_bytes.unflatten(-1, (fmt.page_size, -1)), fmt.nbits)
    scale = _from_bytes(scale_bytes, SCALE_DTYPE, fmt)
    zero = _from_bytes(zero_bytes, ZERO_DTYPE, fmt) if fmt.asym else None
    return codes, scale, zero


def _as_bytes(parameters: torch.Tensor) -> torch.Tensor:
    return parameters.flatten(-2).contiguous().view(torch.uint8)


def _from_bytes(raw: torch.Tensor, dtype: torch.dtype, fmt: TensorFormat) -> torch.Tensor:
    return raw.contiguous().view(dtype).unflatten(-1, fmt.parameter_shape)
