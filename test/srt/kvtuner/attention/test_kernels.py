"""Every implementation of the kernels against the definition: attention in float64, packed bytes, and what a step leaves."""

import random

import pytest
import torch

from harness.cache_model import CacheModel
from harness.formats import SHAPES, all_formats, mixed_layers, random_format, tensor_format
from harness.kernels import make_case, run, tolerance
from sglang.srt.kvtuner.attention.triton import TritonKernels
from sglang.srt.kvtuner.format.page_codec import pack_pages

PAGE_FORMATS = all_formats(SHAPES)


@pytest.mark.parametrize("bits", ("K2", "K4", "K8", "K16", "V2", "V4", "V8", "V16"))
def test_packed_bytes_equal_the_definition(kernels, bits):
    formats = [fmt for name, fmt in PAGE_FORMATS.items() if name.startswith(bits + "-")]
    assert formats
    for fmt in formats:
        torch.manual_seed(fmt.head_dim)
        shape = (3, fmt.page_size, fmt.head_dim)
        inputs = [
            x.to(dtype) for x in page_inputs(shape, fmt) for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
        if kernels is TritonKernels:  # two pages, for the interpreter
            inputs = [x[:1] for x in random.Random(repr(fmt)).sample(inputs[:: 1 if fmt.quantized else 3], 2)]
        for pages in inputs:
            if pages.isfinite().all():
                assert torch.equal(kernels.pack_pages(pages, fmt), pack_pages(pages, fmt)), (fmt, pages.abs().max())


def page_inputs(shape, fmt):
    if not fmt.quantized:  # from subnormal to nearly infinite
        return [torch.randn(shape) * torch.logspace(-42, 38, fmt.head_dim), torch.randn(shape)]
    sizes = [(1, 0), (1, 30), (1e-6, 0), (1e4, 1e3), (0, 0), (1e-3, 1000)]
    return [torch.randn(shape) * size + torch.randn(fmt.head_dim) * shift for size, shift in sizes]


SHAPES_OF_STEPS = {
    "one token of a new request": ([0], [1]),
    "window only": ([17, 40], [1, 1]),
    "exactly one page": ([64, 128], [1, 1]),
    "odd lengths": ([63, 65, 191, 333], [1, 1, 1, 1]),
    "unequal batch": ([1, 2900, 64, 500], [1, 1, 1, 1]),
    "first chunk": ([0, 0], [131, 7]),
    "later chunk": ([192, 67], [70, 129]),
    "mixed batch": ([450, 0, 129, 64], [1, 33, 65, 64]),
    "chunk longer than the ring": ([100], [400]),
}


@pytest.mark.parametrize("shape", SHAPES_OF_STEPS)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_steps(kernels, shape, group):
    rng = random.Random(f"{shape}{group}")
    lengths, counts = SHAPES_OF_STEPS[shape]
    head_dims = (64, 80, 96, 128, 256)
    # One after the other over the parameters, for the interpreter.
    for head_dim in [rng.choice(head_dims)] if kernels is TritonKernels else head_dims:
        key, value = (random_format(rng, 64, head_dim, lanes) for lanes in (True, False))
        residual, sinks = rng.choice((0, 64, 128)), rng.choice((0, 3))
        model = make_case(kernels, key, value, 2 * group, 2, residual, sinks=sinks, lengths=lengths)
        error = run(model, *counts)
        assert error <= tolerance(kernels), (key, value, error)


BITS = [(2, 2), (4, 4), (8, 8), (8, 4), (4, 2), (2, 8), (16, 4), (2, 16), (16, 16)]


@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("bits", BITS, ids=lambda b: f"K{b[0]}V{b[1]}")
def test_formats(kernels, bits, axes, asym):
    cases = [(64, 64), (16, 32)]
    if kernels is TritonKernels:  # one of them: its code for keys does not depend on values
        cases = [cases[(sum(bits) // 2 + sum(axes) + asym) % 2]]
    for group, page in cases:
        key = tensor_format(bits[0], asym, axes[0], group, page, 64, True)
        value = tensor_format(bits[1], asym, axes[1], group, page, 64, False)
        model = make_case(kernels, key, value, 6, 2, 32, lengths=(300, 129))
        assert run(model, 1, 1) <= tolerance(kernels)
        assert run(model, 90, 1) <= tolerance(kernels)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_rotated_keys(kernels, head_dim, axis):
    """The packed prefix is rotated, the residual window and the step's own rows are not."""
    key = tensor_format(4, True, axis, 16, 64, head_dim, True, rotated=True)
    value = tensor_format(8, False, 0, 16, 64, head_dim, False)
    model = make_case(kernels, key, value, 6, 2, 64, lengths=(400, 70, 10))
    assert run(model, 1, 1, 1) <= tolerance(kernels)
    assert run(model, 90, 200, 1) <= tolerance(kernels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page, sinks", [(64, 1), (64, 4), (64, 64), (128, 100), (128, 128)])
def test_sinks(kernels, page, sinks, dtype):
    """Also a whole page of them, and more than a tile; the requests are within their first page, past it, and far."""
    key, value = tensor_format(2, True, 1, 64, page, 64, True), tensor_format(2, False, 0, 64, page, 64, False)
    if kernels is TritonKernels and dtype == torch.bfloat16 and page > 64:
        pytest.skip("takes Triton's interpreter too long; float32 is not skipped")
    lengths = (page - 1, page, 3 * page + 7)
    model = make_case(kernels, key, value, 6, 2, 0, dtype, sinks, lengths)
    for _ in range(2):  # the second reads the sinks that the first one stored
        assert run(model, 1, 1, 1) <= tolerance(kernels, dtype)
    assert run(model, 70, 1, page) <= tolerance(kernels, dtype)
    stored = (model.storage.layers[0].key.sinks != 0).flatten(1).any(1).sum()
    assert stored == 3, "the first pages of three requests"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(kernels, dtype):
    key, value = tensor_format(4, True, 1, 64, 64, 64, True), tensor_format(4, True, 0, 64, 64, 64, False)
    model = make_case(kernels, key, value, 9, 3, 64, dtype, lengths=(400, 10))
    assert run(model, 1, 1) <= tolerance(kernels, dtype)
    assert run(model, 70, 1) <= tolerance(kernels, dtype)


def test_strided_rows(kernels):
    """q, k and v are parts of one projection in a model."""
    key, value = tensor_format(4, False, 0, 64, 64, 64, True), tensor_format(4, False, 0, 64, 64, 64, False)
    model = make_case(kernels, key, value, 4, 2, 64, lengths=(200,))
    model.table.extend(1, 280)
    projection = torch.randn(80, 16, 64)
    parts = (projection[:, 3:7], projection[:, 9:11], projection[:, 12:14])
    plan = model.kernels.plan(model.planner.plan([1], [200], [80]))
    strided, contiguous = (model.kernels.attend(0, plan, *rows, 0.1) for rows in (parts, [p.clone() for p in parts]))
    assert not parts[0].is_contiguous() and torch.equal(strided, contiguous)
    model.kernels.store(0, plan, *parts[1:])
    assert torch.equal(model.storage.layers[0].value.ring[1, 279 % model.storage.ring_length], parts[2][-1])


def test_outliers_in_keys_keep_the_tolerance(kernels):
    key, value = tensor_format(8, True, 1, 64, 64, 64, True), tensor_format(8, True, 1, 64, 64, 64, False)
    model = make_case(kernels, key, value, 3, 1, 0)
    model.size[:, ::16] *= 10
    model.offset[:, 5] = 5
    model.step((1, 500), attend=False)
    assert run(model, 1) <= tolerance(kernels)


RESIDUALS = {16: (0, 1, 15, 16, 63, 64, 65, 128), 32: (0, 40), 64: (63, 64, 65, 128, 10_000)}


@pytest.mark.parametrize(
    "page, residual, sinks",
    [(page, r, 0) for page, residuals in RESIDUALS.items() for r in residuals]
    + [(16, 0, 4), (16, 20, 16), (32, 40, 1)],
)
def test_interleaved_requests(kernels, page, residual, sinks):
    """Chunks, decodes, prefix hits, and slots and pages that go from request to request, in layers of other formats."""
    formats, steps = mixed_layers(page, sinks), 50
    if kernels is TritonKernels:
        if (page, residual, sinks) not in ((16, 20, 16), (32, 40, 1), (16, 65, 0)):
            pytest.skip("three of them take Triton's interpreter long enough")
        steps = 12
    model = CacheModel(kernels, formats, heads=6, kv_heads=2, residual=residual, dtype=torch.bfloat16)
    rng, slots = random.Random(page + residual), (1, 2, 3)
    for slot in slots:
        model.begin(slot)
    for _ in range(steps):
        chunks = (1, 1, 1, 1, 3, page, rng.randint(2, 5 * page // 2))
        batch = [(slot, rng.choice(chunks)) for slot in rng.sample(slots, rng.randint(1, 3))]
        assert model.step(*batch) <= tolerance(kernels, torch.bfloat16)
        for slot in slots:
            if len(model.requests[slot]) > 8 * page or rng.random() < 0.04:
                others = [other for other in slots if other != slot]
                model.begin(slot, rng.choice((None, *others)), prefix_pages=rng.randint(1, 3))
    assert model.blocks
    model.check()


def test_sinks_of_a_page_that_changes_hands(kernels):
    """A request reads the sinks of the page that it found; a page that is first again has those of its new owner."""
    formats = mixed_layers(16, sinks=4)
    model = CacheModel(kernels, formats, heads=6, kv_heads=2, residual=0, num_pages=4)
    model.begin(1)
    model.step((1, 20))
    model.begin(2, prefix_of=1, prefix_pages=1)
    assert model.step((2, 1)) <= tolerance(kernels)
    first = model.table.pages[1][0]
    sinks = model.storage.layers[1].key.sinks
    kept = sinks.clone()
    assert torch.equal(kept[first], model.requests[1].tokens[:4, 1, 0])
    model.shared.clear()
    for slot in (1, 2):
        model.begin(slot)
    model.table.free([first])
    model.step((1, 17))
    assert model.table.pages[1][0] == first and not torch.equal(sinks[first], kept[first])
    assert model.step((1, 1)) <= tolerance(kernels)
    model.check()
