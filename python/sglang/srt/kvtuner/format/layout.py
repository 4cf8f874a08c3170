"""Packing of 2-, 4- and 8-bit codes into bytes: the one definition of the bit layout.

The last dimension (n codes) is cut into 8/bits equal parts; byte j holds code j of every part, the first part in the
lowest bits. Codes are stored offset-binary (code - q_min), so that unpacking is a mask and a shift per part and needs
no moves across lanes::

    4 bits:  byte j = u[j] | u[j + n/2] << 4
    2 bits:  byte j = u[j] | u[j + n/4] << 2 | u[j + n/2] << 4 | u[j + 3n/4] << 6
"""

from __future__ import annotations

import torch

from sglang.srt.kvtuner.format.quantizer import SUPPORTED_BITS, code_range


def codes_per_byte(nbits: int) -> int:
    """4, 2 or 1 for 2, 4 or 8 bits. Raises ValueError for other widths."""
    if nbits not in SUPPORTED_BITS:
        raise ValueError(f"nbits is {nbits!r}; supported are {SUPPORTED_BITS}")
    return 8 // nbits


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack int8 codes [..., n] into uint8 [..., n * nbits / 8].

    Raises ValueError when n is not a multiple of the codes in a byte.
    """
    parts = codes_per_byte(nbits)
    if codes.shape[-1] % parts:
        raise ValueError(f"{codes.shape[-1]} codes of {nbits} bits do not fill whole bytes")
    unsigned = (codes.to(torch.int16) - code_range(nbits)[0]).to(torch.uint8)
    split = unsigned.unflatten(-1, (parts, -1))
    packed = split[..., 0, :].clone()
    for part in range(1, parts):
        packed |= split[..., part, :] << (part * nbits)
    return packed


def unpack(packed: torch.Tensor, nbits: int) -> torch.Tensor:
    """Unpack uint8 [..., m] into int8 codes [..., m * 8 / nbits]; the inverse of :func:`pack`."""
    parts = codes_per_byte(nbits)
    mask = (1 << nbits) - 1
    split = [(packed >> (part * nbits)) & mask for part in range(parts)]
    unsigned = torch.cat(split, dim=-1)
    return (unsigned.to(torch.int16) + code_range(nbits)[0]).to(torch.int8)
