"""The C++ kernels against the torch reference: packed bytes, attention, and what a step leaves in the cache."""

import random
from types import SimpleNamespace

import pytest
import torch

from sglang.srt.kvtuner.attention import cpu as kernels_cpu
from sglang.srt.kvtuner.attention import dispatch
from sglang.srt.kvtuner.attention.backend import attend
from sglang.srt.kvtuner.attention.steps import StepPlanner
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.config.cache_format import CacheFormat
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.hadamard import block_size
from sglang.srt.kvtuner.format.page_codec import encode_pages

TOLERANCE = 2e-3
SLOTS = 6


@pytest.fixture(scope="module", params=["avx512", "avx2", "plain"])
def isa(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_KVTUNER_CPU_ISA", request.param)
        try:
            kernels_cpu.module().body_name()
        except kernels_cpu.KernelsUnavailable as e:
            pytest.skip(str(e))
        except ValueError as e:
            pytest.skip(str(e))
        yield request.param


def tensor_format(nbits, asym, axis, group, page, head_dim, token_lanes, rotated=False):
    if nbits == 16:
        return TensorFormat.unquantized(page, head_dim, token_lanes)
    return TensorFormat(
        nbits=nbits, asym=asym, axis=axis, group_size=group, page_size=page, head_dim=head_dim, token_lanes=token_lanes,
        hadamard=block_size(head_dim) if rotated else 0,
    )  # fmt: skip


def random_format(rng, page, head_dim, token_lanes, asym=None):
    nbits = rng.choice((2, 4, 8, 16))
    axis = rng.choice((0, 1))
    divisors = [g for g in (16, 32, 48, 64, 80, 96, 128, 256) if (head_dim if axis == 0 else page) % g == 0]
    asym = rng.random() < 0.5 if asym is None else asym
    rotated = token_lanes and rng.random() < 0.5
    return tensor_format(nbits, asym, axis, rng.choice(divisors), page, head_dim, token_lanes, rotated)


@pytest.mark.parametrize("token_lanes", [True, False], ids=["keys", "values"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_packed_bytes_equal_the_reference(isa, nbits, asym, axis, token_lanes):
    torch.manual_seed(nbits)
    for page, head_dim, group in [(64, 64, 64), (64, 128, 32), (32, 96, 16), (16, 80, 16), (128, 256, 64)]:
        fmt = tensor_format(nbits, asym, axis, min(group, page), page, head_dim, token_lanes)
        for size, shift in [(1, 0), (1, 30), (1e-6, 0), (1e4, 1e3), (0, 0), (1e-3, 1000)]:
            x = torch.randn(3, page, head_dim) * size + torch.randn(head_dim) * shift
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                pages = x.to(dtype)
                if pages.isfinite().all():
                    assert torch.equal(kernels_cpu.pack_pages(pages, fmt), encode_pages(pages, fmt)), (fmt, size, shift)


@pytest.mark.parametrize("token_lanes", [True, False], ids=["keys", "values"])
def test_unquantized_bytes_equal_the_reference(isa, token_lanes):
    torch.manual_seed(0)
    for page, head_dim in [(64, 64), (32, 96), (16, 80), (128, 256)]:
        fmt = TensorFormat.unquantized(page, head_dim, token_lanes)
        x = torch.randn(3, page, head_dim) * torch.logspace(-42, 38, head_dim)  # from subnormal to nearly infinite
        for pages in (x, x.bfloat16(), torch.randn(3, page, head_dim).half()):
            assert torch.equal(kernels_cpu.pack_pages(pages, fmt), encode_pages(pages, fmt)), fmt


class Case:
    """A cache filled by the reference, twice: one to run the kernels on, one for the reference."""

    def __init__(self, key, value, heads, kv_heads, residual, dtype, max_tokens=512, sinks=0):
        self.plan = CacheFormat((LayerFormat(key, value, sinks),), key.page_size, residual)
        self.heads, self.kv_heads, self.head_dim, self.dtype = heads, kv_heads, key.head_dim, dtype
        page, tokens = key.page_size, -(-max_tokens // key.page_size) * key.page_size
        pages = torch.randperm(SLOTS * tokens // page) + 1
        table = (pages[:, None] * page + torch.arange(page)).reshape(SLOTS, tokens)
        requests = SimpleNamespace(req_to_token=table.to(torch.int32), req_generation=torch.zeros(SLOTS))
        self.pools, self.planners = [], []
        for _ in range(2):
            pool = KVTunerTokenToKVPool(
                self.plan, size=SLOTS * tokens, num_slots=SLOTS, kv_heads=kv_heads, full_precision_dtype=dtype,
                device="cpu", start_layer=0, end_layer=1,
            )  # fmt: skip
            self.pools.append(pool)
            self.planners.append(StepPlanner(self.plan, pool.window, requests))
        self.kernels = kernels_cpu.CpuKernels(self.plan.layers)
        # Channels differ in size and offset, as keys do.
        self.scale, self.shift = torch.rand(2, kv_heads, self.head_dim) * 2

    def rows(self, count, heads=None):
        x = torch.randn(count, heads or self.kv_heads, self.head_dim)
        return (x if heads else x * self.scale + self.shift).to(self.dtype)

    def fill(self, lengths):
        for slot, length in enumerate(lengths):
            k, v = self.rows(length), self.rows(length)
            for planner, pool in zip(self.planners, self.pools):
                for step in planner.plan_batch([slot], [0], [length]):
                    pool.store(0, step, k, v)

    def step(self, priors, news):
        """Run a step by both, compare output and cache; returns the largest error of a row, relative to its norm."""
        slots, rows = list(range(len(priors))), sum(news)
        q, k, v = self.rows(rows, self.heads) * 2, self.rows(rows), self.rows(rows)
        scaling = self.head_dim**-0.5
        pool, expected_pool = self.pools
        plan = self.planners[0].plan_flat(slots, priors, news)
        out = self.kernels.forward(pool, 0, plan, q, k, v, scaling).float()
        expected = torch.empty_like(out)
        for step in self.planners[1].plan_batch(slots, priors, news):
            k_new, v_new = k[step.tokens], v[step.tokens]
            k_prior, v_prior = expected_pool.read_prior(0, step)
            expected_pool.store(0, step, k_new, v_new)
            keys, values = torch.cat([k_prior, k_new.float()]), torch.cat([v_prior, v_new.float()])
            expected[step.tokens] = attend(q[step.tokens], keys, values, scaling=scaling)
        whole = [(p, p.window, p.sinks) for p in (pool, expected_pool)]
        for ours, theirs in zip(*whole):
            assert torch.equal(ours.keys[0], theirs.keys[0]) and torch.equal(ours.values[0], theirs.values[0])
        return ((out - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


SHAPES = {
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_attention_and_stored_step(isa, shape, group):
    rng = random.Random(f"{shape}{group}")
    priors, news = SHAPES[shape]
    for head_dim in (64, 80, 96, 128, 256):
        torch.manual_seed(head_dim)
        key, value = (random_format(rng, 64, head_dim, lanes) for lanes in (True, False))
        longest, residual, sinks = max(map(sum, zip(priors, news))), rng.choice((0, 64, 128)), rng.choice((0, 3))
        case = Case(key, value, 2 * group, 2, residual, torch.float32, longest, sinks)
        case.fill(priors)
        error = case.step(priors, news)
        assert error <= TOLERANCE, (key, value, error)


BITS = [(2, 2), (4, 4), (8, 8), (8, 4), (4, 2), (2, 8), (16, 4), (2, 16), (16, 16)]


@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("bits", BITS, ids=lambda b: f"K{b[0]}V{b[1]}")
def test_formats(isa, bits, axes, asym):
    torch.manual_seed(0)
    for group, page in [(64, 64), (16, 32)]:
        key = tensor_format(bits[0], asym, axes[0], group, page, 64, True)
        value = tensor_format(bits[1], asym, axes[1], group, page, 64, False)
        case = Case(key, value, 6, 2, 32, torch.float32)
        case.fill([300, 129])
        assert case.step([300, 129], [1, 1]) <= TOLERANCE
        assert case.step([301, 130], [90, 1]) <= TOLERANCE


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("asym", [False, True], ids=["sym", "asym"])
def test_rotated_bytes_equal_the_reference(isa, asym, axis):
    torch.manual_seed(0)
    for nbits, page, head_dim in [(4, 64, 64), (2, 64, 128), (8, 32, 96), (4, 16, 80), (4, 64, 256)]:
        fmt = tensor_format(nbits, asym, axis, 16, page, head_dim, True, rotated=True)
        for size, shift in [(1, 0), (1, 30), (1e-6, 0), (1e4, 1e3), (0, 0)]:
            pages = torch.randn(3, page, head_dim) * size + torch.randn(head_dim) * shift
            assert torch.equal(kernels_cpu.pack_pages(pages, fmt), encode_pages(pages, fmt)), (fmt, size, shift)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_over_rotated_keys(isa, head_dim, axis):
    """The packed prefix is rotated, the window and the step's own rows are not."""
    torch.manual_seed(0)
    key = tensor_format(4, True, axis, 16, 64, head_dim, True, rotated=True)
    case = Case(key, tensor_format(8, False, 0, 16, 64, head_dim, False), 6, 2, 64, torch.float32)
    case.fill([400, 70, 10])
    for priors, news in [([400, 70, 10], [1, 1, 1]), ([401, 71, 11], [90, 200, 1])]:
        assert case.step(priors, news) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("page, sinks", [(64, 1), (64, 4), (64, 64), (128, 100), (128, 128)])
def test_sinks(isa, page, sinks, dtype):
    """Also a whole page of them, and more than a tile; the requests are within their first page, past it, and far."""
    torch.manual_seed(0)
    formats = (tensor_format(2, True, 1, 64, page, 64, True), tensor_format(2, False, 0, 64, page, 64, False))
    case = Case(*formats, 6, 2, 0, dtype, sinks=sinks)
    case.fill([page - 1, page, 3 * page + 7])
    tolerance = TOLERANCE + torch.finfo(dtype).eps / 2
    for step in range(2):  # the second reads the sinks that the first one stored
        assert case.step([page - 1 + step, page + step, 3 * page + 7 + step], [1, 1, 1]) <= tolerance
    assert case.step([page + 1, page + 2, 3 * page + 9], [70, 1, page]) <= tolerance
    stored = (case.pools[0].sinks.keys[0] != 0).flatten(1).any(1).sum()
    assert stored == 3, "the first pages of three requests"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(isa, dtype):
    torch.manual_seed(0)
    formats = (tensor_format(4, True, 1, 64, 64, 64, True), tensor_format(4, True, 0, 64, 64, 64, False))
    case = Case(*formats, 9, 3, 64, dtype)
    case.fill([400, 10])
    for priors, news in [([400, 10], [1, 1]), ([401, 11], [70, 1])]:
        # The output itself is rounded: half a unit in the last place is 2^-9 for bfloat16.
        assert case.step(priors, news) <= TOLERANCE + torch.finfo(dtype).eps / 2


def test_strided_rows(isa):
    """q, k and v are parts of one projection in a model."""
    torch.manual_seed(0)
    formats = (tensor_format(4, False, 0, 64, 64, 64, True), tensor_format(4, False, 0, 64, 64, 64, False))
    case = Case(*formats, 6, 2, 64, torch.float32)
    case.fill([200])
    case.rows = lambda count, heads=None: torch.randn(count, 16, 64)[:, 3 : 3 + (heads or 2)]
    assert case.step([200], [80]) <= TOLERANCE


def test_outliers_in_keys_keep_the_tolerance(isa):
    torch.manual_seed(0)
    formats = (tensor_format(8, True, 1, 64, 64, 64, True), tensor_format(8, True, 1, 64, 64, 64, False))
    case = Case(*formats, 3, 1, 0, torch.float32)
    case.scale[:, ::16] *= 10
    case.shift[:, 5] = 5
    case.fill([500])
    assert case.step([500], [1]) <= TOLERANCE


def test_formats_that_do_not_fill_vectors_get_the_reference(caplog):
    fmt = tensor_format(4, False, 0, 8, 8, 24, True)
    assert "divide by 16" in kernels_cpu.unsupported(fmt)
    assert dispatch.choose_kernels("cpu", (LayerFormat(fmt, fmt),)) is None
    assert "torch reference" in caplog.text


def test_the_environment_can_ask_for_the_reference(monkeypatch):
    fmt = tensor_format(4, False, 0, 64, 64, 64, True)
    monkeypatch.setenv("SGLANG_KVTUNER_KERNELS", "reference")
    assert dispatch.choose_kernels("cpu", (LayerFormat(fmt, fmt),)) is None
    monkeypatch.setenv("SGLANG_KVTUNER_KERNELS", "fast")
    with pytest.raises(ValueError, match="SGLANG_KVTUNER_KERNELS"):
        dispatch.choose_kernels("cpu", (LayerFormat(fmt, fmt),))


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("SGLANG_KVTUNER_CPU_ISA", "neon")
    with pytest.raises(ValueError, match="neon"):
        kernels_cpu.module().body_name()


def test_read_pages_reads_every_block_of_the_step():
    torch.manual_seed(0)
    keys, values = torch.randint(256, (9, 2, 64), dtype=torch.uint8), torch.randint(256, (9, 2, 136), dtype=torch.uint8)
    pages = torch.tensor([7, 2, 5, 8, 1], dtype=torch.int32)
    sequences = torch.tensor([[0, 0, 1, 130, 128, 0], [1, 1, 1, 30, 0, 2], [2, 2, 1, 200, 192, 2]])

    def checksum(blocks):
        whole = blocks.shape[-1] // 64 * 64
        words = blocks[..., :whole].contiguous().view(torch.int64)
        return words.sum() + blocks[..., whole:].long().sum()

    expected = sum(checksum(x[pages.long()]) for x in (keys, values)).item()
    assert kernels_cpu.module().read_pages(keys, values, sequences, pages, 64) == expected
