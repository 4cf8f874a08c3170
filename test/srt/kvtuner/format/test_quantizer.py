"""The reference quantizer: KVTuner's own results, error bounds of stored scales, and extreme groups."""

import json

import numpy as np
import pytest
import torch

from sglang.srt.kvtuner.format.quantizer import code_range, quantize

ALL = [(bits, asym, axis) for bits in (2, 4, 8) for asym in (False, True) for axis in (0, 1)]


def groups_last(tensor, axis):
    """Rows of one group each, in the order of the golden vectors."""
    return tensor if axis == 0 else tensor.transpose(-1, -2)


@pytest.mark.parametrize("bits, asym, axis", ALL)
def test_golden_vectors(shared_data, bits, asym, axis):
    folder = shared_data("quantizer-golden")
    cases = [
        case
        for case in json.loads((folder / "index.json").read_text())
        if (case["nbits"], case["asym"], case["axis"]) == (bits, asym, axis)
    ]
    assert cases
    for case in cases:
        golden = {name: torch.from_numpy(array) for name, array in np.load(folder / case["file"]).items()}
        q = quantize(golden["x"], nbits=bits, asym=asym, axis=axis, group_size=case["group_size"])
        codes = groups_last(q.codes, axis).reshape(golden["codes"].shape)
        assert torch.equal(codes, golden["codes"]), case
        assert torch.equal(groups_last(q.scale, axis).flatten(), golden["scale"]), case
        if asym:
            assert torch.equal(groups_last(q.zero, axis).flatten(), golden["zero"]), case
        else:
            assert q.zero is None and golden["zero"].numel() == 0
        torch.testing.assert_close(q.dequantize(), golden["dequant"], rtol=2**-22, atol=0, msg=str(case))


def samples(kind):
    torch.manual_seed(len(kind))
    x = torch.randn(3, 64, 32)
    return {
        "normal": x,
        "small": x * 1e-3,
        "tiny": x * 1e-5,
        "large": x * 1e4,
        "huge offset": x + 5e3,
        "negative offset": x * 0.01 - 300,
        "outlier": torch.where(torch.rand_like(x) < 0.01, x * 100, x),
        "zeros": torch.zeros_like(x),
        "constant": torch.full_like(x, -3.14),
    }[kind]


KINDS = ["normal", "small", "tiny", "large", "huge offset", "negative offset", "outlier", "zeros", "constant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits, asym, axis", ALL)
def test_stored_scales_keep_the_error_within_half_a_step(kind, bits, asym, axis):
    x, (low, high) = samples(kind), code_range(bits)
    exact = quantize(x, nbits=bits, asym=asym, axis=axis, group_size=16)
    stored = quantize(x, nbits=bits, asym=asym, axis=axis, group_size=16, scale_dtype=torch.float16)
    assert stored.scale.dtype == torch.float16
    assert low <= stored.codes.min() and stored.codes.max() <= high
    step, exact_step = stored.scale.float(), exact.scale
    # Half a step, what a step that was rounded down leaves beyond the last code, and float32 rounding.
    shortfall = (exact_step - step).clamp(min=0) * (high - low)
    magnitude = x.abs().amax()
    bound = 0.5 * step + shortfall + magnitude * 2**-22
    dim = -1 if axis == 0 else -2
    error = (stored.dequantize() - x).abs().unflatten(dim, (-1, 16)).amax(dim)
    assert (error <= bound).all(), f"{(error / step).max():.4g} steps"
    # The stored scale itself is the exact one up to half-precision rounding, or raised for a group far from zero.
    raised = x.unflatten(dim, (-1, 16)).amin(dim).abs() / 30_000 if asym else torch.zeros(1)
    assert (step >= exact_step * (1 - 2**-11) - 2**-25).all()
    assert (step <= torch.maximum(exact_step, raised) * (1 + 2**-11) + 2**-24).all()


@pytest.mark.parametrize("bits", (2, 4, 8))
@pytest.mark.parametrize("sign", (1, -1))
def test_zero_points_of_narrow_groups_far_from_zero_fit_int16(bits, sign):
    """Rounding the scale must not push the zero point out of its 16 bits: it would wrap and change sign."""
    offsets = sign * torch.logspace(-6, 4.5, 4001)
    for width in (0.0, 1e-3):
        x = offsets[:, None] * (1 + width * torch.linspace(0, 1, 8))
        q = quantize(x, nbits=bits, asym=True, axis=0, group_size=8, scale_dtype=torch.float16)
        assert torch.equal(q.zero, q.zero.to(torch.int16).float())
        error = (q.dequantize() - x).abs().amax(-1)
        half_a_step = 0.5 * (offsets.abs() * width).clamp(min=1e-5) / (2**bits - 1)
        # Threefold, because the smallest scales are coarse in half precision; a wrapped zero point is off by thousands.
        assert (error <= 3 * torch.maximum(half_a_step, offsets.abs() * 2**-16) + 2**-25).all()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_input_is_computed_in_float32(dtype):
    x = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    for bits, asym, axis in ALL:
        given = quantize(x, nbits=bits, asym=asym, axis=axis, group_size=32)
        widened = quantize(x.float(), nbits=bits, asym=asym, axis=axis, group_size=32)
        assert torch.equal(given.codes, widened.codes)
        assert torch.equal(given.scale, widened.scale)
        assert given.dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("bits, asym, axis", ALL)
def test_group_of_minus_one_is_the_whole_dimension(bits, asym, axis):
    x = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(2))
    whole = quantize(x, nbits=bits, asym=asym, axis=axis, group_size=-1)
    named = quantize(x, nbits=bits, asym=asym, axis=axis, group_size=24 if axis == 0 else 16)
    assert whole.group_size == named.group_size
    assert torch.equal(whole.codes, named.codes) and torch.equal(whole.scale, named.scale)
    assert whole.scale.shape == ((2, 16, 1) if axis == 0 else (2, 1, 24))


@pytest.mark.parametrize("bits, asym, axis", ALL)
def test_every_group_is_quantized_alone(bits, asym, axis):
    """Values of one group have no influence on another."""
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    (changed[:, :8] if axis == 0 else changed[:8]).mul_(1000)
    before = quantize(x, nbits=bits, asym=asym, axis=axis, group_size=8).dequantize()
    after = quantize(changed, nbits=bits, asym=asym, axis=axis, group_size=8).dequantize()
    same = (slice(None), slice(8, None)) if axis == 0 else (slice(8, None),)
    assert torch.equal(before[same], after[same])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("scale_dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("bits", (4, 8))
def test_symmetric_quantization_is_idempotent(bits, scale_dtype):
    """Where the largest value has the code q_max, its own scale comes back and with it every code."""
    x = torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(4))
    largest = x.unflatten(-1, (-1, 32)).abs().amax(-1)
    x.unflatten(-1, (-1, 32))[..., 0] = largest
    settings = dict(nbits=bits, asym=False, axis=0, group_size=32, scale_dtype=scale_dtype)
    once = quantize(x, **settings)
    twice = quantize(once.dequantize(), **settings)
    assert torch.equal(once.codes, twice.codes)


def test_hand_computed_groups():
    x = torch.tensor([[-1.0, 0.5, 2.0, 7.0]])
    q = quantize(x, nbits=4, asym=False, axis=0, group_size=4)
    assert q.scale.item() == 1.0 and q.codes.tolist() == [[-1, 0, 2, 7]]  # 0.5 rounds to even
    # Two bits symmetric: q_max is 1, so the scale is the largest magnitude and -2 is never reached.
    q = quantize(x, nbits=2, asym=False, axis=0, group_size=4)
    assert q.scale.item() == 7.0 and q.codes.tolist() == [[0, 0, 0, 1]]
    q = quantize(torch.tensor([[-3.0, 12.0]]), nbits=4, asym=True, axis=0, group_size=2)
    assert q.scale.item() == 1.0 and q.zero.item() == -3 + 8
    assert q.codes.tolist() == [[-8, 7]] and q.dequantize().tolist() == [[-3.0, 12.0]]


def test_the_input_is_left_alone():
    x = torch.randn(8, 8)
    kept = x.clone()
    quantize(x, nbits=2, asym=True, axis=1, group_size=8, scale_dtype=torch.float16)
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"nbits": 3}, "nbits is 3; supported are"),
        ({"nbits": 16}, "nbits is 16"),
        ({"axis": 2}, "axis is 2; 0 is per token"),
        ({"axis": -1}, "axis is -1"),
        ({"group_size": 5}, "group_size 5 does not divide the 12 elements that axis 0 groups"),
        ({"group_size": 12, "axis": 1}, "group_size 12 does not divide the 8 elements that axis 1 groups"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -2}, "group_size -2"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.zeros(8, 12), **{"nbits": 4, "asym": False, "axis": 0, "group_size": 4, **change})
