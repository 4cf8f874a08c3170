"""Blocks there and back: nothing is lost beyond quantization, and the bytes are where the layout says."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from sglang.srt.kvtuner.format.formats import TensorFormat
from sglang.srt.kvtuner.format.page_codec import pack_pages, split_blocks, unpack_pages
from sglang.srt.kvtuner.format.quantizer import quantize

FORMATS = [
    TensorFormat(nbits, asym, axis, group, page, head_dim)
    for nbits, asym, (axis, group, page, head_dim) in product(
        (2, 4, 8), (False, True), [(0, 64, 64, 128), (0, 16, 16, 80), (0, 96, 32, 96), (1, 64, 64, 64), (1, 16, 32, 80)]
    )
]
ids = [f"{f.nbits}-{'asym' if f.asym else 'sym'}-axis{f.axis}-g{f.group_size}-page{f.page_size}" for f in FORMATS]


def quantized(x, fmt):
    return quantize(
        x, nbits=fmt.nbits, asym=fmt.asym, axis=fmt.axis, group_size=fmt.group_size, scale_dtype=torch.float16
    )


def pages(fmt, *lead):
    generator = torch.Generator().manual_seed(fmt.head_dim)
    x = torch.randn(*lead, fmt.page_size, fmt.head_dim, generator=generator)
    return x * 3 + torch.randn(fmt.head_dim, generator=generator) * 20  # channels differ in offset, as keys do


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0, 2)])
def test_decoding_gives_what_the_quantizer_gives(fmt, lead):
    x = pages(fmt, *lead)
    blocks = pack_pages(x, fmt)
    assert blocks.dtype == torch.uint8 and blocks.shape == (*lead, fmt.block_bytes)
    decoded = unpack_pages(blocks, fmt)
    assert decoded.dtype == torch.float32 and decoded.shape == x.shape
    if x.numel():
        assert torch.equal(decoded, quantized(x, fmt).dequantize())


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_split_blocks_gives_the_stored_parts(fmt):
    x = pages(fmt, 2, 3)
    expected = quantized(x, fmt)
    codes, scale, zero = split_blocks(pack_pages(x, fmt), fmt)
    assert codes.dtype == torch.int8 and torch.equal(codes, expected.codes)
    assert scale.dtype == torch.float16 and torch.equal(scale, expected.scale)
    assert scale.shape[-2:] == fmt.parameter_shape
    if fmt.asym:
        assert zero.dtype == torch.int16 and torch.equal(zero.float(), expected.zero)
    else:
        assert zero is None


def place_of(fmt, token, channel):
    """Byte and lowest bit of a code in a block, from the description of the layout in layout.py."""
    reduction, lane, lanes = (channel, token, fmt.page_size) if fmt.token_lanes else (token, channel, fmt.head_dim)
    span = 32 // fmt.nbits
    vector = reduction // span * (lanes // 16) + lane // 16
    word, number = reduction % 2, reduction % span // 2
    return vector * 64 + lane % 16 * 4 + word * 2 + number * fmt.nbits // 8, number * fmt.nbits % 8


@pytest.mark.parametrize("token_lanes", (False, True))
@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_bytes_are_codes_then_scales_then_zero_points(fmt, token_lanes):
    fmt = replace(fmt, token_lanes=token_lanes)
    x = pages(fmt, 1)[0]
    expected = quantized(x, fmt)
    raw = bytes(pack_pages(x, fmt).tolist())
    codes = bytearray(fmt.code_bytes)
    for token, row in enumerate(expected.codes.tolist()):
        for channel, code in enumerate(row):
            byte, shift = place_of(fmt, token, channel)
            codes[byte] |= code + (1 << (fmt.nbits - 1)) << shift
    parameters = [expected.scale.numpy().astype("<f2")]
    if fmt.asym:
        parameters.append(expected.zero.numpy().astype("<i2"))
    # Tokens are neighbours for axis 0, channels for axis 1.
    tail = [(p.T if fmt.axis == 0 else p).tobytes() for p in parameters]
    assert raw == bytes(codes) + b"".join(tail)


def test_what_does_not_fill_vectors_is_stored_row_by_row():
    fmt = TensorFormat(4, False, 0, 8, 8, 8)
    x = pages(fmt)
    expected = quantized(x, fmt)
    row = expected.codes.int() + 8
    codes = bytes((row[:, :4] | row[:, 4:] << 4).flatten().tolist())
    assert bytes(pack_pages(x, fmt).tolist()) == codes + expected.scale.numpy().astype("<f2").T.tobytes()


UNQUANTIZED = [
    TensorFormat.unquantized(page, head_dim, lanes)
    for page, head_dim in [(64, 64), (32, 80)]
    for lanes in (False, True)
]


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0, 2)])
@pytest.mark.parametrize("fmt", [*UNQUANTIZED, TensorFormat.unquantized(8, 9, True)], ids=str)
def test_unquantized_pages_are_the_values_in_bfloat16(fmt, lead):
    x = pages(fmt, *lead)
    for given in (x, x.half(), x.bfloat16()):
        decoded = unpack_pages(pack_pages(given, fmt), fmt)
        assert decoded.dtype == torch.float32 and torch.equal(decoded, given.bfloat16().float())


@pytest.mark.parametrize("fmt", UNQUANTIZED, ids=str)
def test_bytes_of_unquantized_pages(fmt):
    x = pages(fmt, 1)[0].bfloat16()
    raw, values = bytes(pack_pages(x, fmt).tolist()), x.view(torch.int16).numpy().astype("<i2")
    for token in range(fmt.page_size):
        for channel in range(fmt.head_dim):
            byte, shift = place_of(fmt, token, channel)
            assert shift == 0 and raw[byte : byte + 2] == values[token, channel].tobytes()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_pages(dtype):
    fmt = FORMATS[0]
    x = pages(fmt, 2).to(dtype)
    assert torch.equal(pack_pages(x, fmt), pack_pages(x.float(), fmt))


def test_views_encode_and_decode_like_copies():
    """The cache hands over transposed tokens and gathers rows of a larger buffer."""
    fmt = TensorFormat(4, True, 1, 16, 16, 32)
    tokens = torch.randn(2, 16, 3, 32)  # pages, tokens, heads, elements
    blocks = pack_pages(tokens.transpose(1, 2), fmt)
    assert torch.equal(blocks, pack_pages(tokens.transpose(1, 2).contiguous(), fmt))
    wide = torch.zeros(2, 3, fmt.block_bytes + 1, dtype=torch.uint8)
    wide[..., 1:] = blocks  # parameters at odd addresses
    assert torch.equal(unpack_pages(wide[..., 1:], fmt), unpack_pages(blocks, fmt))


def test_blocks_of_another_format_are_refused():
    fmt, other = TensorFormat(4, False, 0, 32, 16, 32), TensorFormat(4, True, 0, 32, 16, 32)
    with pytest.raises(RuntimeError):
        unpack_pages(pack_pages(torch.zeros(16, 32), fmt), other)


DAMAGE = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("bad", DAMAGE)
@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_a_group_that_is_not_finite_is_not_finite_when_it_is_read(fmt, bad):
    """The rest of the page is as it was, and the bytes of the damaged group are always the same."""
    x = pages(fmt, 1)[0]
    x[3, 5] = bad
    codes, scale, zero = split_blocks(pack_pages(x, fmt), fmt)
    values = unpack_pages(pack_pages(x, fmt), fmt)
    damaged = torch.zeros_like(x, dtype=torch.bool)
    if fmt.axis == 0:
        first = 5 // fmt.group_size * fmt.group_size
        damaged[3, first : first + fmt.group_size] = True
    else:
        first = 3 // fmt.group_size * fmt.group_size
        damaged[first : first + fmt.group_size, 5] = True
    assert torch.equal(values.isnan(), damaged)
    x[3, 5] = 0
    assert torch.equal(values[~damaged], unpack_pages(pack_pages(x, fmt), fmt)[~damaged])
    assert (codes[damaged] == 0).all() and scale.view(torch.int16)[scale.isnan()].tolist() == [0x7E00]
    assert zero is None or (zero[scale.isnan()] == 0).all()


@pytest.mark.parametrize("size", (1e9, 1e20, 1e30, 3e38))
@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_huge_values_saturate(fmt, size):
    """Nothing wraps around: signs are kept, and what the largest scale and zero point give is the bound."""
    x = pages(fmt, 1)[0].sign() * size
    values = unpack_pages(pack_pages(x, fmt), fmt)
    assert values.isfinite().all()
    largest = 65504.0 * (2**fmt.nbits + 2**15 if fmt.asym else 2 ** (fmt.nbits - 1))
    assert (values.abs() <= largest).all()
    if not fmt.asym:
        assert torch.equal(values.sign(), x.sign())
