"""The rotation of keys before quantization: an orthonormal Walsh-Hadamard transform along head_dim.

Queries and keys rotated by the same orthonormal matrix H have the products that they had: (H q) . (H k) = q . k. Rotated
keys have no outlier channels, so that groups along head_dim lose less (QuaRot, NeurIPS 2024, section 4: keys are
rotated after RoPE, per head). Keys are rotated when a page is packed; kernels rotate queries for packed pages alone, and
the reference rotates dequantized keys back, since H is symmetric and thus its own inverse.

Where head_dim is no power of two, H is block-diagonal with blocks of the largest power of two that divides it.

The same transform in C++, bit for bit: sgl-kernel/include/sgl_kernel/kvtuner/cpu/hadamard.h.
"""

from __future__ import annotations

import torch


def block_size(head_dim: int) -> int:
    """The largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """Every ``block`` neighbours (a power of two) of the last dimension times the orthonormal Hadamard matrix of that
    size, in Sylvester's order.

    x: [..., n], n a multiple of ``block``. Returns float32 of the same shape, computed in float32.
    """
    y = x.float()
    half = 1
    while half < block:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        half *= 2
    return y * block**-0.5
