"""Pages to packed blocks and back, in plain torch: the reference for every kernel.

A block is codes, then scales (float16), then zero points (int16), without padding. How they lie is made for attention,
which multiplies rows by the matrix x[reduction, lanes]: for keys (``token_lanes``) lanes are tokens and the reduction
is over channels, for values lanes are channels and the reduction is over tokens.

Codes come in vectors of 64 bytes, [reduction / span, lanes / 16], span = 32 / bits. Each of a vector's 16 lanes has two
16-bit words, little-endian; word h holds elements h, 2 + h, 4 + h … of the span from its lowest bits up, so that a
shift and a mask give pairs of neighbours. Where lanes or reduction do not fill vectors, codes are row-major
[page, head_dim * bits / 8] as in layout.py, and only this reference reads them. Group parameters are
[head_dim / group, page] for axis 0 and [page / group, head_dim] for axis 1.

16 bits are bfloat16 values (any other dtype is rounded to it, half to even) in the same vectors, span 2, without
parameters.

The same layout in C++: sgl-kernel/include/sgl_kernel/kvtuner/kv_codec.h.
"""

from __future__ import annotations

import torch

from sglang.srt.kvtuner.format.formats import SCALE_DTYPE, ZERO_DTYPE, TensorFormat
from sglang.srt.kvtuner.format.hadamard import rotate
from sglang.srt.kvtuner.format.layout import pack, unpack
from sglang.srt.kvtuner.format.quantizer import PER_TOKEN, dequantize_groups, quantize

LANES = 16


def encode_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Rotate, where the format says so, quantize and pack full-precision pages.

    x: [..., page_size, head_dim], any float dtype. Returns uint8 [..., block_bytes].
    """
    if not fmt.quantized:
        return _pack_values(x.to(torch.bfloat16), fmt)
    if fmt.hadamard:
        x = rotate(x, fmt.hadamard)
    q = quantize(x, nbits=fmt.nbits, asym=fmt.asym, axis=fmt.axis, group_size=fmt.group_size, scale_dtype=SCALE_DTYPE)
    parts = [_pack_codes(q.codes, fmt), _as_bytes(q.scale, fmt)]
    if q.zero is not None:
        parts.append(_as_bytes(q.zero.to(ZERO_DTYPE), fmt))
    return torch.cat(parts, dim=-1)


def decode_pages(blocks: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """Dequantize packed blocks, uint8 [..., block_bytes], and undo their rotation; float32 [..., page_size, head_dim]."""
    if not fmt.quantized:
        return _unpack_values(blocks, fmt).float()
    codes, scale, zero = split_blocks(blocks, fmt)
    x = dequantize_groups(codes, scale, zero, axis=fmt.axis, group_size=fmt.group_size)
    return rotate(x, fmt.hadamard) if fmt.hadamard else x


def split_blocks(blocks: torch.Tensor, fmt: TensorFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 [..., page_size, head_dim], scales float16 and zero points int16 (None when symmetric) of
    quantized blocks."""
    widths = [fmt.code_bytes, fmt.scale_bytes, fmt.zero_bytes]
    code_bytes, scale_bytes, zero_bytes = blocks.split(widths, dim=-1)
    codes = _unpack_codes(code_bytes, fmt)
    scale = _from_bytes(scale_bytes, SCALE_DTYPE, fmt)
    zero = _from_bytes(zero_bytes, ZERO_DTYPE, fmt) if fmt.asym else None
    return codes, scale, zero


def tiled(fmt: TensorFormat) -> bool:
    """Whether blocks of ``fmt`` lie in vectors, which kernels need."""
    lanes, reduction = _lanes_and_reduction(fmt)
    return lanes % LANES == 0 and reduction % (32 // fmt.nbits) == 0


def _lanes_and_reduction(fmt: TensorFormat) -> tuple[int, int]:
    return (fmt.page_size, fmt.head_dim) if fmt.token_lanes else (fmt.head_dim, fmt.page_size)


def _pack_codes(codes: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    if not tiled(fmt):
        return pack(codes, fmt.nbits).flatten(-2)
    x = codes.transpose(-1, -2) if fmt.token_lanes else codes
    # Element (byte of the word, code in the byte, word) of a span; pack() puts codes of one byte where it finds them
    # a part of the last dimension apart.
    x = x.unflatten(-2, (-1, 2, 8 // fmt.nbits, 2)).unflatten(-1, (-1, LANES))
    n = x.dim() - 6
    x = x.permute(*range(n), n, n + 2, n + 4, n + 5, n + 3, n + 1)
    return pack(x.flatten(n + 1), fmt.nbits).flatten(-2)


def _unpack_codes(code_bytes: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    if not tiled(fmt):
        return unpack(code_bytes.unflatten(-1, (fmt.page_size, -1)), fmt.nbits)
    _, reduction = _lanes_and_reduction(fmt)
    x = unpack(code_bytes.unflatten(-1, (reduction * fmt.nbits // 32, -1)), fmt.nbits)
    x = x.unflatten(-1, (8 // fmt.nbits, -1, LANES, 2, 2))
    n = x.dim() - 6
    x = x.permute(*range(n), n, n + 5, n + 1, n + 4, n + 2, n + 3)
    x = x.flatten(n + 4).flatten(n, n + 3)
    return x.transpose(-1, -2) if fmt.token_lanes else x


def _pack_values(values: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    if tiled(fmt):
        x = values.transpose(-1, -2) if fmt.token_lanes else values
        values = x.unflatten(-2, (-1, 2)).transpose(-1, -2).flatten(-3, -2)  # [reduction / 2 * lanes, word]
    return values.contiguous().view(torch.uint8).flatten(-2)


def _unpack_values(blocks: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    values = blocks.contiguous().view(torch.bfloat16)
    if not tiled(fmt):
        return values.unflatten(-1, (fmt.page_size, -1))
    lanes, reduction = _lanes_and_reduction(fmt)
    x = values.unflatten(-1, (reduction // 2, lanes, 2)).transpose(-1, -2).flatten(-3, -2)
    return x.transpose(-1, -2) if fmt.token_lanes else x


def _as_bytes(parameters: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    if fmt.axis == PER_TOKEN:
        parameters = parameters.transpose(-1, -2)
    return parameters.flatten(-2).contiguous().view(torch.uint8)


def _from_bytes(raw: torch.Tensor, dtype: torch.dtype, fmt: TensorFormat) -> torch.Tensor:
    parameters = raw.contiguous().view(dtype)
    if fmt.axis == PER_TOKEN:
        return parameters.unflatten(-1, fmt.parameter_shape[::-1]).transpose(-1, -2)
    return parameters.unflatten(-1, fmt.parameter_shape)
