"""The pool against a cache that keeps everything: exact reads, exact pages, and nothing written elsewhere."""

import random

import pytest
import torch

from harness.cache import RequestTable, mixed_format
from sglang.srt.kvtuner.attention.steps import StepPlanner
from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool
from sglang.srt.kvtuner.format.page_codec import pack_pages, unpack_pages

HEADS, HEAD_DIM, SLOTS = 2, 16, (1, 2, 3)
START, END = 1, 3  # this rank's layers of the cache format's four


def make_pool(cache_format, num_pages=40, dtype=torch.bfloat16, num_slots=4):
    return KVTunerTokenToKVPool(
        cache_format,
        size=(num_pages - 1) * cache_format.page_size,
        num_slots=num_slots,
        kv_heads=HEADS,
        full_precision_dtype=dtype,
        device="cpu",
        start_layer=START,
        end_layer=END,
    )


class Request:
    """All tokens of one request in full precision, [tokens, layers, K and V, heads, head_dim], and where it began."""

    def __init__(self, tokens):
        self.tokens, self.start = tokens, tokens.shape[0]

    def __len__(self):
        return self.tokens.shape[0]


class Oracle:
    """A pool under test beside full-precision copies of every request, and what each page must hold."""

    def __init__(self, page_size, residual, num_pages=160, dtype=torch.bfloat16, seed=0, sinks=0):
        self.format, self.dtype = mixed_format(page_size, residual, head_dim=HEAD_DIM, sinks=sinks), dtype
        self.pool = make_pool(self.format, num_pages, dtype)
        self.table = RequestTable(page_size, len(SLOTS) + 1, num_pages, max_pages=32, seed=seed)
        self.planner = StepPlanner(self.format, self.pool.window, self.table)
        self.requests = {}
        self.blocks = {}  # (page, layer, 0 for K or 1 for V) to its block
        self.shared = set()  # pages that a later request took as its prefix
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, slot, prefix_of=None, prefix_pages=0):
        """Put a new request into the slot; its prefix is the first whole pages of another slot's request."""
        page = self.format.page_size
        prefix, pages = torch.empty(0, END - START, 2, HEADS, HEAD_DIM, dtype=self.dtype), []
        if prefix_of is not None:
            prefix_pages = min(prefix_pages, len(self.requests[prefix_of]) // page)
            prefix = self.requests[prefix_of].tokens[: prefix_pages * page]
            pages = self.table.pages[prefix_of][:prefix_pages]
            self.shared.update(pages)
        if slot in self.requests:
            self.table.free([p for p in self.table.pages[slot] if p not in self.shared])
        self.table.begin(slot, pages)
        self.requests[slot] = Request(prefix)

    def step(self, *batch):
        slots, news = zip(*batch)
        priors = [len(self.requests[slot]) for slot in slots]
        for slot, prior, new in zip(slots, priors, news):
            self.table.extend(slot, prior + new)
        for step in self.planner.plan_batch(list(slots), priors, list(news)):
            request = self.requests[step.slot]
            new = torch.randn(step.new, END - START, 2, HEADS, HEAD_DIM, generator=self.generator)
            new = (new * torch.tensor([3.0, 0.2]).view(2, 1, 1)).to(self.dtype)
            for layer in range(START, END):
                for half, read in enumerate(self.pool.read_prior(layer, step)):
                    assert torch.equal(read, self.expected(request, layer, half)), (layer, half, step)
                self.pool.store(layer, step, new[:, layer - START, 0], new[:, layer - START, 1])
            request.tokens = torch.cat([request.tokens, new])
            self._pack(step.slot, step.prior, len(request))

    def expected(self, request, layer, half):
        """What a step must read: every position by the rule of the residual window."""
        page, tokens = self.format.page_size, request.tokens[:, layer - START, half]
        fmt = (self.format.layers[layer].key, self.format.layers[layer].value)[half]
        packed = [
            first
            for first in range(0, len(request), page)
            if first < request.start or first + page <= len(request) - self.format.residual_length
        ]
        result = tokens.float()
        for first in packed:
            block = pack_pages(tokens[first : first + page].transpose(0, 1), fmt)
            result[first : first + page] = unpack_pages(block, fmt).transpose(0, 1)
        sinks = self.format.layers[layer].sink_length
        result[:sinks] = tokens[:sinks].float()  # in packed pages or not
        return result

    def _pack(self, slot, prior, end):
        page = self.format.page_size
        for index in range(prior // page, end // page):
            tokens = self.requests[slot].tokens[index * page : (index + 1) * page]
            for layer in range(START, END):
                formats = self.format.layers[layer]
                for half, fmt in enumerate((formats.key, formats.value)):
                    block = pack_pages(tokens[:, layer - START, half].transpose(0, 1), fmt)
                    self.blocks[self.table.pages[slot][index], layer, half] = block

    def check_pages(self):
        """Every page holds what it was last filled with; all others, and padding, are untouched."""
        for layer in range(START, END):
            for half, buffers in enumerate((self.pool.keys, self.pool.values)):
                expected = torch.zeros_like(buffers[layer - START])
                for (page, of_layer, of_half), block in self.blocks.items():
                    if (of_layer, of_half) == (layer, half):
                        expected[page] = block
                assert torch.equal(buffers[layer - START], expected)


WINDOWS = {16: (0, 1, 15, 16, 63, 64, 65, 128), 32: (0, 40), 64: (63, 64, 65, 128, 10_000)}


@pytest.mark.parametrize(
    "page_size, residual, sinks",
    [(page, r, 0) for page, residuals in WINDOWS.items() for r in residuals] + [(16, 0, 4), (16, 20, 16), (32, 40, 1)],
)
def test_interleaved_requests(page_size, residual, sinks):
    """Chunks, decodes, prefix hits, and slots and pages that go from request to request."""
    oracle, rng = Oracle(page_size, residual, sinks=sinks), random.Random(page_size + residual)
    for slot in SLOTS:
        oracle.begin(slot)
    for _ in range(50):
        chunks = (1, 1, 1, 1, 3, page_size, rng.randint(2, 5 * page_size // 2))
        oracle.step(*[(slot, rng.choice(chunks)) for slot in rng.sample(SLOTS, rng.randint(1, 3))])
        for slot in SLOTS:
            if len(oracle.requests[slot]) > 8 * page_size or rng.random() < 0.04:
                others = [other for other in SLOTS if other != slot]
                oracle.begin(slot, rng.choice((None, *others)), prefix_pages=rng.randint(1, 3))
    assert oracle.blocks
    oracle.check_pages()


@pytest.mark.parametrize("residual", (0, 1, 63, 64, 65, 128))
def test_decode_over_several_pages(residual):
    oracle = Oracle(64, residual)
    oracle.begin(1)
    oracle.step((1, 40))
    for _ in range(230):
        oracle.step((1, 1))
    oracle.check_pages()


@pytest.mark.parametrize("prior", (0, 5, 16, 33))
def test_a_chunk_longer_than_the_ring(prior):
    """Its pages come from its own tokens and the ring's, of which it overwrites every row."""
    oracle = Oracle(16, 20)
    oracle.begin(1)
    if prior:
        oracle.step((1, prior))
    oracle.step((1, 4 * oracle.pool.window.length + 3))
    for _ in range(20):
        oracle.step((1, 1))
    oracle.check_pages()


def test_a_prefix_of_another_request_is_read_as_packed():
    """Also where it lies inside the window: the ring has only what its request computed."""
    oracle = Oracle(16, 128)
    oracle.begin(1)
    oracle.step((1, 70))
    oracle.begin(2, prefix_of=1, prefix_pages=4)
    oracle.step((2, 30), (1, 1))
    for _ in range(40):
        oracle.step((1, 1), (2, 1))
    oracle.begin(1, prefix_of=2, prefix_pages=2)
    oracle.step((1, 1), (2, 1))
    oracle.check_pages()


def test_sinks_of_a_page_that_changes_hands():
    """A request reads the sinks of the page that it found; a page that is first again has those of its new owner."""
    oracle = Oracle(16, 0, num_pages=4, sinks=4)
    oracle.begin(1)
    oracle.step((1, 20))
    oracle.begin(2, prefix_of=1, prefix_pages=1)
    oracle.step((2, 1))
    first = oracle.table.pages[1][0]
    assert oracle.table.pages[2][0] == first
    kept = oracle.pool.sinks.keys[0].clone()
    assert torch.equal(kept[first], oracle.requests[1].tokens[:4, 0, 0])
    assert not kept[oracle.table.pages[1][1]].any(), "only first pages have sinks"
    oracle.shared.clear()
    for slot in (1, 2):
        oracle.begin(slot)
    oracle.table.free([first])
    oracle.step((1, 17))
    assert oracle.table.pages[1][0] == first and not torch.equal(oracle.pool.sinks.keys[0][first], kept[first])
    oracle.step((1, 1))


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_other_full_precision_types(dtype):
    oracle = Oracle(16, 16, dtype=dtype)
    oracle.begin(1)
    for chunk in (20, 1, 1, 30, 1):
        oracle.step((1, chunk))
    oracle.check_pages()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_memory_is_what_the_formats_say(dtype):
    cache_format = mixed_format(page_size=32, residual=40)
    pool = make_pool(cache_format, num_pages=11, dtype=dtype, num_slots=7)
    local = cache_format.layers[START:END]
    keys = [11 * HEADS * layer.key.block_bytes for layer in local]
    values = [11 * HEADS * layer.value.block_bytes for layer in local]
    assert [t.nbytes for t in pool.keys] == keys and [t.nbytes for t in pool.values] == values
    assert pool.packed_bytes() == sum(layer.page_bytes_per_head for layer in local) * 11 * HEADS
    ring = 7 * cache_format.ring_length * HEADS * HEAD_DIM * dtype.itemsize
    assert pool.window.size_bytes() == 2 * len(local) * ring
    assert pool.get_kv_size_bytes() == (sum(keys) + 2 * ring, sum(values) + 2 * ring)
    assert pool.mem_usage * 2**30 == pytest.approx(sum(pool.get_kv_size_bytes()))


def test_what_upstream_reads_of_a_pool():
    cache_format = mixed_format(page_size=32, residual=40)
    pool = make_pool(cache_format, num_pages=11)
    assert (pool.size, pool.page_size, pool.dtype, pool.layer_num) == (320, 32, torch.uint8, 2)
    assert pool.start_layer == START and pool.full_precision_dtype == torch.bfloat16


def test_there_are_no_rows_by_token_slot():
    """Upstream code that writes or reads such rows must fail and not corrupt pages."""
    pool, rows = make_pool(mixed_format()), torch.zeros(1, HEADS, HEAD_DIM)
    for call in (
        lambda: pool.get_key_buffer(1),
        lambda: pool.get_value_buffer(1),
        lambda: pool.get_kv_buffer(1),
        lambda: pool.set_kv_buffer(None, torch.tensor([1]), rows, rows),
    ):
        with pytest.raises(NotImplementedError, match="not supported with --enable-kvtuner-quant"):
            call()
