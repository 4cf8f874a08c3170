"""The bit layout: bytes worked out by hand, and every code there and back."""

import pytest
import torch

from sglang.srt.kvtuner.format.layout import codes_per_byte, pack, unpack
from sglang.srt.kvtuner.format.quantizer import code_range


def all_codes(nbits):
    low, high = code_range(nbits)
    return torch.arange(low, high + 1, dtype=torch.int8)


@pytest.mark.parametrize(
    "nbits, codes, expected",
    [
        # 8 bits: code + 128.
        (8, [-128, -1, 0, 127], [0x00, 0x7F, 0x80, 0xFF]),
        # 4 bits: code + 8; byte j holds code j in its low half and code j + n/2 in its high half.
        (4, [-8, -1, 7, 0, 3, -7], [0x00 | 0x8 << 4, 0x7 | 0xB << 4, 0xF | 0x1 << 4]),
        # 2 bits: code + 2; byte j holds codes j, j + n/4, j + n/2, j + 3n/4 from the lowest bits up.
        (2, [-2, -1, 0, 1], [0 | 1 << 2 | 2 << 4 | 3 << 6]),
        (2, [1, -2, 0, 1, -1, -1, -2, 0], [3 | 2 << 2 | 1 << 4 | 0 << 6, 0 | 3 << 2 | 1 << 4 | 2 << 6]),
    ],
)
def test_bytes(nbits, codes, expected):
    packed = pack(torch.tensor(codes, dtype=torch.int8), nbits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert unpack(packed, nbits).tolist() == codes


@pytest.mark.parametrize("nbits", (2, 4, 8))
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 5), (7, 1, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("bytes_per_row", (1, 3, 16, 40))
def test_round_trip(nbits, lead, bytes_per_row):
    low, high = code_range(nbits)
    n = bytes_per_row * codes_per_byte(nbits)
    codes = torch.randint(low, high + 1, (*lead, n), dtype=torch.int8)
    packed = pack(codes, nbits)
    assert packed.shape == (*lead, bytes_per_row)
    back = unpack(packed, nbits)
    assert back.dtype == torch.int8 and torch.equal(back, codes)


@pytest.mark.parametrize("nbits", (2, 4, 8))
def test_every_code_at_every_place_of_a_byte(nbits):
    parts = codes_per_byte(nbits)
    rows = torch.cartesian_prod(*[all_codes(nbits)] * parts).view(-1, parts)
    packed = pack(rows, nbits)
    assert packed.unique().numel() == 256, "every byte is used"
    assert torch.equal(unpack(packed, nbits), rows)


@pytest.mark.parametrize("nbits", (2, 4, 8))
def test_other_memory_layouts(nbits):
    low, high = code_range(nbits)
    codes = torch.randint(low, high + 1, (16, 24), dtype=torch.int8)
    expected = pack(codes.contiguous(), nbits)
    assert torch.equal(pack(codes.T.contiguous().T, nbits), expected)
    wide = torch.zeros(16, 48, dtype=torch.int8)
    wide[:, ::2] = codes
    assert torch.equal(pack(wide[:, ::2], nbits), expected)


def test_packing_leaves_the_codes_alone():
    codes = torch.tensor([-2, -1, 0, 1], dtype=torch.int8)
    pack(codes, 2)
    assert codes.tolist() == [-2, -1, 0, 1]


@pytest.mark.parametrize("nbits, n", [(4, 3), (2, 6), (2, 1)])
def test_codes_that_leave_a_byte_unfilled_are_refused(nbits, n):
    with pytest.raises(ValueError, match=f"{n} codes of {nbits} bits do not fill whole bytes"):
        pack(torch.zeros(2, n, dtype=torch.int8), nbits)


@pytest.mark.parametrize("nbits", (0, 1, 3, 5, 16, -4))
def test_other_widths_are_refused(nbits):
    for call in (
        lambda: codes_per_byte(nbits),
        lambda: pack(torch.zeros(8, dtype=torch.int8), nbits),
        lambda: unpack(torch.zeros(8, dtype=torch.uint8), nbits),
    ):
        with pytest.raises(ValueError, match=f"nbits is {nbits}; supported are"):
            call()


def test_codes_per_byte():
    assert [codes_per_byte(nbits) for nbits in (2, 4, 8)] == [4, 2, 1]
