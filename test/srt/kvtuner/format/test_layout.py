"""The bit layouts: bytes worked out by hand, every code there and back, and the places that layouts say."""

import pytest
import torch

from sglang.srt.kvtuner.format.layout import RowLayout, VectorLayout, codes_per_byte, layout_of
from sglang.srt.kvtuner.format.quantizer import code_range

LAYOUTS = [
    layout_of(nbits, page, head_dim, token_lanes)
    for nbits in (2, 4, 8, 16)
    for page, head_dim in [(64, 64), (16, 80), (32, 96), (16, 256), (8, 8), (16, 100), (8, 120)]
    for token_lanes in (True, False)
]


def random_codes(layout, *lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*lead, layout.page_size, layout.head_dim)
    if layout.nbits == 16:
        return torch.randn(shape, generator=generator).bfloat16()
    low, high = code_range(layout.nbits)
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=generator)


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
def test_bytes_of_a_row(nbits, codes, expected):
    layout = RowLayout(nbits, 1, len(codes))
    packed = layout.pack_codes(torch.tensor([codes], dtype=torch.int8))
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert layout.unpack_codes(packed).tolist() == [codes]


@pytest.mark.parametrize(
    "nbits, token, channel, byte, shift",
    [
        # Keys of 64 tokens: a vector holds 16 tokens, its 32-bit words 32 / bits channels of one.
        (4, 0, 0, 0, 0),
        (4, 0, 1, 2, 0),  # odd channels in the high half of the word
        (4, 0, 2, 0, 4),
        (4, 0, 6, 1, 4),
        (4, 1, 0, 4, 0),
        (4, 16, 0, 64, 0),
        (4, 0, 8, 4 * 64, 0),
        (2, 3, 2, 12, 2),
        (2, 3, 16, 4 * 64 + 12, 0),
        (8, 63, 63, 4095, 0),
        (16, 5, 1, 22, 0),
    ],
)
def test_places_of_keys_by_hand(nbits, token, channel, byte, shift):
    layout = VectorLayout(nbits, 64, 64, True)
    assert (layout.byte_of(token, channel), layout.shift_of(token, channel)) == (byte, shift)
    turned = VectorLayout(nbits, 64, 64, False)
    assert (turned.byte_of(channel, token), turned.shift_of(channel, token)) == (byte, shift)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_codes_are_where_the_layout_says(layout):
    codes = random_codes(layout)
    expected = bytearray(layout.code_bytes)
    for token in range(layout.page_size):
        for channel in range(layout.head_dim):
            byte, shift = layout.byte_of(token, channel), layout.shift_of(token, channel)
            if layout.nbits == 16:
                expected[byte : byte + 2] = codes[token, channel].view(torch.int16).numpy().tobytes()
            else:
                expected[byte] |= (int(codes[token, channel]) - code_range(layout.nbits)[0]) << shift
    assert bytes(layout.pack_codes(codes).tolist()) == bytes(expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)])
def test_round_trip(layout, lead):
    codes = random_codes(layout, *lead)
    packed = layout.pack_codes(codes)
    assert packed.shape == (*lead, layout.code_bytes) and packed.dtype == torch.uint8
    back = layout.unpack_codes(packed)
    assert back.dtype == codes.dtype and torch.equal(back, codes)


@pytest.mark.parametrize("nbits", (2, 4, 8))
def test_every_byte_is_used(nbits):
    layout = VectorLayout(nbits, 256, 256, True)
    assert layout.pack_codes(random_codes(layout)).unique().numel() == 256


@pytest.mark.parametrize("nbits", (2, 4, 8, 16))
def test_other_memory_layouts(nbits):
    layout = layout_of(nbits, 16, 32, True)
    codes = random_codes(layout)
    expected = layout.pack_codes(codes)
    assert torch.equal(layout.pack_codes(codes.T.contiguous().T), expected)
    wide = torch.zeros(16, 64, dtype=codes.dtype)
    wide[:, ::2] = codes
    assert torch.equal(layout.pack_codes(wide[:, ::2]), expected)


def test_packing_leaves_the_codes_alone():
    codes = torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8)
    RowLayout(2, 1, 4).pack_codes(codes)
    assert codes.tolist() == [[-2, -1, 0, 1]]


def test_vectors_are_taken_where_they_can_be_filled():
    filled = [(4, 64, 64, True), (2, 16, 80, True), (2, 32, 96, False), (16, 16, 120, True)]
    rows = [(4, 8, 64, True), (2, 64, 72, True), (4, 16, 120, False), (8, 64, 100, False)]
    assert all(isinstance(layout_of(*shape), VectorLayout) for shape in filled)
    assert all(isinstance(layout_of(*shape), RowLayout) for shape in rows)


@pytest.mark.parametrize("nbits", (0, 1, 3, 5, 16, -4))
def test_other_widths_are_refused(nbits):
    with pytest.raises(ValueError, match=f"nbits is {nbits}; supported are"):
        codes_per_byte(nbits)


def test_codes_per_byte():
    assert [codes_per_byte(nbits) for nbits in (2, 4, 8)] == [4, 2, 1]
