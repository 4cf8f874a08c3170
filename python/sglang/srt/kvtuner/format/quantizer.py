"""The reference quantizer: KVTuner's vanilla (round-to-nearest) group quantization in plain torch.

With ``q_min = -2**(n-1)`` and ``q_max = 2**(n-1) - 1`` for n bits, per group of elements x:

* symmetric:  ``scale = max|x| / q_max``, ``code = clamp(round(x / scale))``, ``x ~ code * scale``
* asymmetric: ``scale = (max - min) / (2**n - 1)``, ``zero = round(min / scale) - q_min``,
  ``code = clamp(round(x / scale - zero))``, ``x ~ (code + zero) * scale``

Rounding is half to even; ``max|x|`` and ``max - min`` are at least 1e-5. Source: KVTuner (ICML 2025),
section 3, the per-token and per-channel round-to-nearest quantizers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RANGE_FLOOR = 1e-5
PER_TOKEN = 0
PER_CHANNEL = 1
SUPPORTED_BITS = (2, 4, 8)
# "Leave this half of the layer alone": the cache stores bfloat16 values, and nothing is quantized.
UNQUANTIZED_BITS = 16
STORED_BITS = (*SUPPORTED_BITS, UNQUANTIZED_BITS)
# A stored zero point is an int16. Groups whose offset is far larger than their range would overflow it, so their
# scale is raised to at least |min| / MAX_STORED_ZERO; the error that this adds is below 2**-15 of the offset.
MAX_STORED_ZERO = 32000
# Offsets beyond what the largest float16 scale reaches (2e9) saturate.
_ZERO_RANGE = (-(1 << 15), (1 << 15) - 1)


def code_range(nbits: int) -> tuple[int, int]:
    """Smallest and largest code of ``nbits``: ``(-2**(n-1), 2**(n-1) - 1)``."""
    return -(1 << (nbits - 1)), (1 << (nbits - 1)) - 1


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and group parameters of one tensor [..., tokens, head_dim].

    codes: int8, shape of the input, values within :func:`code_range`.
    scale: [..., tokens, head_dim / group] (axis 0) or [..., tokens / group, head_dim] (axis 1).
    zero: same shape as scale, integers in float32; None when symmetric.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    nbits: int
    axis: int
    group_size: int

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``(codes + zero) * scale`` computed in float32 and cast to ``dtype``; shape of ``codes``."""
        return dequantize_groups(self.codes, self.scale, self.zero, axis=self.axis, group_size=self.group_size).to(
            dtype
        )


def quantize(
    x: torch.Tensor,
    *,
    nbits: int,
    asym: bool,
    axis: int,
    group_size: int,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    """Quantize ``x`` [..., tokens, head_dim] (any float dtype; computed in float32).

    axis 0 (per token) makes groups of ``group_size`` neighbours along head_dim, axis 1 (per channel) along tokens;
    ``group_size`` -1 takes the whole dimension. With ``scale_dtype`` float16 the scale is rounded to what the cache
    stores before codes and zero points are computed, and zero points fit an int16.

    A group with an element that is NaN or infinite gets the scale NaN, codes 0 and zero point 0: all of it is NaN when it
    is read, so that damage shows wherever the page goes.

    Raises ValueError for bits other than 2, 4, 8, an axis other than 0, 1, and a group that does not divide its
    dimension.
    """
    if nbits not in SUPPORTED_BITS:
        raise ValueError(f"nbits is {nbits!r}; supported are {SUPPORTED_BITS}")
    dim = group_dimension(axis)
    group = x.shape[dim] if group_size == -1 else group_size
    if group <= 0 or x.shape[dim] % group:
        raise ValueError(f"group_size {group_size} does not divide the {x.shape[dim]} elements that axis {axis} groups")
    q_min, q_max = code_range(nbits)
    grouped = x.float().unflatten(dim, (-1, group))
    inner = dim  # unflatten puts the group's elements where the dimension was; its groups come just before
    finite = grouped.isfinite().all(inner, keepdim=True)
    grouped = torch.where(finite, grouped, 0.0)
    if asym:
        low, high = grouped.amin(inner, keepdim=True), grouped.amax(inner, keepdim=True)
        scale = (high - low).clamp(min=RANGE_FLOOR) / (q_max - q_min)
        if scale_dtype != torch.float32:
            # Half a step more, so that rounding the scale cannot take it below what the zero point needs.
            scale = torch.maximum(scale, low.abs() / MAX_STORED_ZERO + _smallest_step(scale_dtype) / 2)
        scale = _round_scale(scale, scale_dtype)
        zero = torch.round(low / scale) - q_min
        if scale_dtype != torch.float32:
            zero = zero.clamp(*_ZERO_RANGE)
        codes = torch.round(grouped / scale - zero)
    else:
        scale = grouped.abs().amax(inner, keepdim=True).clamp(min=RANGE_FLOOR) / q_max
        scale = _round_scale(scale, scale_dtype)
        zero = None
        codes = torch.round(grouped / scale)
    codes = codes.clamp(q_min, q_max).to(torch.int8)
    if zero is not None:
        zero = torch.where(finite, zero, 0.0)
    codes = torch.where(finite, codes, 0).reshape(x.shape)
    scale = torch.where(finite, scale, torch.nan)
    return QuantizedTensor(
        codes=codes,
        scale=scale.squeeze(inner).to(scale_dtype),
        zero=None if zero is None else zero.squeeze(inner),
        nbits=nbits,
        axis=axis,
        group_size=group,
    )


def dequantize_groups(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, *, axis: int, group_size: int
) -> torch.Tensor:
    """float32 ``(codes + zero) * scale`` of codes [..., tokens, head_dim] with scale and zero as in
    :class:`QuantizedTensor`."""
    dim = group_dimension(axis)
    values = codes.float().unflatten(dim, (-1, group_size))
    if zero is not None:
        values = values + zero.float().unsqueeze(dim)
    return (values * scale.float().unsqueeze(dim)).reshape(codes.shape)


def group_dimension(axis: int) -> int:
    """The dimension that groups run along: -1 (head_dim) for axis 0, -2 (tokens) for axis 1."""
    if axis == PER_TOKEN:
        return -1
    if axis == PER_CHANNEL:
        return -2
    raise ValueError(f"axis is {axis!r}; 0 is per token, 1 is per channel")


def _round_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.float32:
        return scale
    return scale.clamp(min=_smallest_step(dtype), max=torch.finfo(dtype).max).to(dtype).float()


def _smallest_step(dtype: torch.dtype) -> float:
    """The smallest positive (subnormal) value, which is the distance of neighbours up to twice the smallest normal."""
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps
