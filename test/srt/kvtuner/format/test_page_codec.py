"""Blocks there and back: nothing is lost beyond quantization, and the bytes are where the layout says."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from sglang.srt.kvtuner.format.formats import TensorFormat
from sglang.srt.kvtuner.format.layout import pack
from sglang.srt.kvtuner.format.page_codec import decode_pages, encode_pages, split_blocks
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
    blocks = encode_pages(x, fmt)
    assert blocks.dtype == torch.uint8 and blocks.shape == (*lead, fmt.block_bytes)
    decoded = decode_pages(blocks, fmt)
    assert decoded.dtype == torch.float32 and decoded.shape == x.shape
    if x.numel():
        assert torch.equal(decoded, quantized(x, fmt).dequantize())


@pytest.mark.parametrize("fmt", FORMATS, ids=ids)
def test_split_blocks_gives_the_stored_parts(fmt):
    x = pages(fmt, 2, 3)
    expected = quantized(x, fmt)
    codes, scale, zero = split_blocks(encode_pages(x, fmt), fmt)
    assert codes.dtype == torch.int8 and torch.equal(codes, expected.codes)
    assert scale.dtype == torch.float16 and torch.equal(scale, expected.scale)
    assert scale.shape[-2:] == fmt.parameter_shape
    if fmt.asym:
        assert zero.dtype == torch.int16 and torch.equal(zero.float(), expected.zero)
    else:
        assert zero is None


def place_of(fmt, token, channel):
    """Byte and lowest bit of a code in a block, from the description of the layout in page_codec.py."""
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
    raw = bytes(encode_pages(x, fmt).tolist())
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
    codes = bytes(pack(expected.codes, 4).flatten().tolist())
    assert bytes(encode_pages(x, fmt).tolist()) == codes + expected.scale.numpy().astype("<f2").T.tobytes()


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
        decoded = decode_pages(encode_pages(given, fmt), fmt)
        assert decoded.dtype == torch.float32 and torch.equal(decoded, given.bfloat16().float())


@pytest.mark.parametrize("fmt", UNQUANTIZED, ids=str)
def test_bytes_of_unquantized_pages(fmt):
    x = pages(fmt, 1)[0].bfloat16()
    raw, values = bytes(encode_pages(x, fmt).tolist()), x.view(torch.int16).numpy().astype("<i2")
    for token in range(fmt.page_size):
        for channel in range(fmt.head_dim):
            byte, shift = place_of(fmt, token, channel)
            assert shift == 0 and raw[byte : byte + 2] == values[token, channel].tobytes()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_pages(dtype):
    fmt = FORMATS[0]
    x = pages(fmt, 2).to(dtype)
    assert torch.equal(encode_pages(x, fmt), encode_pages(x.float(), fmt))


def test_views_encode_and_decode_like_copies():
    """The cache hands over transposed tokens and gathers rows of a larger buffer."""
    fmt = TensorFormat(4, True, 1, 16, 16, 32)
    tokens = torch.randn(2, 16, 3, 32)  # pages, tokens, heads, elements
    blocks = encode_pages(tokens.transpose(1, 2), fmt)
    assert torch.equal(blocks, encode_pages(tokens.transpose(1, 2).contiguous(), fmt))
    wide = torch.zeros(2, 3, fmt.block_bytes + 1, dtype=torch.uint8)
    wide[..., 1:] = blocks  # parameters at odd addresses
    assert torch.equal(decode_pages(wide[..., 1:], fmt), decode_pages(blocks, fmt))


def test_blocks_of_another_format_are_refused():
    fmt, other = TensorFormat(4, False, 0, 32, 16, 32), TensorFormat(4, True, 0, 32, 16, 32)
    with pytest.raises(RuntimeError):
        decode_pages(encode_pages(torch.zeros(16, 32), fmt), other)
