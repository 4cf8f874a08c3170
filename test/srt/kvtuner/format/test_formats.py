"""Bytes that a format promises against bytes that the codec writes."""

from itertools import product

import pytest
import torch

from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.page_codec import pack_pages

BITS, HEAD_DIMS, PAGES = (2, 4, 8), (64, 80, 96, 128, 256), (16, 32, 64)


def formats_of(axis, head_dim):
    for nbits, asym, page in product(BITS, (False, True), PAGES):
        grouped = head_dim if axis == 0 else page
        for group in (8, 16, 32, 40, 48, 64, 96, 128, grouped):
            if grouped % group == 0:
                yield TensorFormat(nbits, asym, axis, group, page, head_dim)


@pytest.mark.parametrize("axis", (0, 1))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_block_takes_the_bytes_that_its_format_says(axis, head_dim):
    formats = list(formats_of(axis, head_dim))
    assert len(formats) >= 36
    for fmt in formats:
        elements = fmt.page_size * head_dim
        parameters = elements // fmt.group_size * (2 if fmt.asym else 1)
        expected = elements * fmt.nbits // 8 + 2 * parameters
        assert fmt.block_bytes == expected, fmt
        assert pack_pages(torch.zeros(2, fmt.page_size, head_dim), fmt).shape == (2, expected), fmt
        assert fmt.stored_bits == pytest.approx(fmt.nbits + (32 if fmt.asym else 16) / fmt.group_size)


@pytest.mark.parametrize("axis", (0, 1))
def test_stored_bits_of_the_default_format(axis):
    """4 bits and a 16-bit scale, or scale and zero point, for 64 elements."""
    assert TensorFormat(4, False, axis, 64, 64, 128).stored_bits == 4.25
    assert TensorFormat(4, True, axis, 64, 64, 128).stored_bits == 4.5


def test_parts_of_a_block():
    fmt = TensorFormat(nbits=2, asym=True, axis=1, group_size=16, page_size=64, head_dim=80)
    assert fmt.parameter_shape == (4, 80)
    assert (fmt.code_bytes, fmt.scale_bytes, fmt.zero_bytes) == (64 * 20, 4 * 80 * 2, 4 * 80 * 2)
    fmt = TensorFormat(nbits=8, asym=False, axis=0, group_size=40, page_size=16, head_dim=80)
    assert fmt.parameter_shape == (16, 2)
    assert (fmt.code_bytes, fmt.scale_bytes, fmt.zero_bytes) == (16 * 80, 16 * 2 * 2, 0)


@pytest.mark.parametrize("token_lanes", (False, True))
@pytest.mark.parametrize("page, head_dim", [(64, 64), (16, 80), (8, 13)])
def test_unquantized_blocks_are_values_alone(page, head_dim, token_lanes):
    fmt = TensorFormat.unquantized(page, head_dim, token_lanes)
    assert fmt.block_bytes == fmt.code_bytes == page * head_dim * 2 and fmt.stored_bits == 16
    assert pack_pages(torch.zeros(3, page, head_dim), fmt).shape == (3, fmt.block_bytes)


def test_a_layer_adds_its_halves():
    key, value = TensorFormat(8, True, 1, 32, 64, 64), TensorFormat(2, False, 0, 64, 64, 64)
    assert LayerFormat(key, value).page_bytes_per_head == key.block_bytes + value.block_bytes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((4, False, 0, 48, 64, 128), r"a group of 48 does not divide 128 \(axis 0\)"),
        ((4, False, 1, 48, 64, 96), r"a group of 48 does not divide 64 \(axis 1\)"),
        ((4, False, 0, 0, 64, 128), "a group of 0"),
        ((4, False, 0, -1, 64, 128), "a group of -1"),
        ((4, False, 0, 13, 64, 13), "head_dim 13 at 4 bits does not fill whole bytes"),
        ((2, False, 0, 6, 64, 6), "head_dim 6 at 2 bits"),
        ((3, False, 0, 8, 64, 64), "nbits is 3"),
        ((16, True, 0, 64, 64, 64), "16 bits have no groups"),
        ((16, False, 1, 64, 64, 64), "16 bits have no groups"),
        ((16, False, 0, 32, 64, 64), "16 bits have no groups"),
        ((16, False, 0, 64, 64, 64, True, 64), "16 bits have no groups"),
        ((4, False, 0, 16, 64, 80, True, 32), "a rotation block of 32 is no power of two that divides 80"),
        ((4, False, 0, 16, 64, 80, True, 80), "a rotation block of 80"),
    ],
)
def test_formats_that_cannot_be_stored_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TensorFormat(*arguments)
