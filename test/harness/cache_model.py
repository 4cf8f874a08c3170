"""A cache under test beside everything that its requests ever stored: what every step must read, return and leave behind."""

import torch

from harness.cache import RequestTable
from sglang.srt.kvtuner.attention.base import Workload
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.config.flags import DEFAULT_WORKSPACE_TOKENS
from sglang.srt.kvtuner.format.page_codec import pack_pages, unpack_pages


def naive_attention(q, k, v, scaling):
    """Causal attention in float64: q [new, heads, dim] ends where k and v [tokens, kv_heads, dim] end."""
    group, earlier = q.shape[1] // k.shape[1], k.shape[0] - q.shape[0]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k) * scaling
    hidden = torch.ones(logits.shape[1:], dtype=torch.bool).triu(earlier + 1)
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, float("-inf")).softmax(-1), v)


class Request:
    """Tokens of a request, [tokens, layers, K and V, kv_heads, head_dim], and how many of them it found in the prefix cache."""

    def __init__(self, tokens):
        self.tokens, self.found = tokens, tokens.shape[0]

    def __len__(self):
        return self.tokens.shape[0]


class CacheModel:
    """Kernels over a cache of ``formats`` (one per layer), and the requests that use it.

    make_kernels: gets the storage and the workload, returns the kernels.
    """

    def __init__(
        self, make_kernels, formats, *, heads, kv_heads, residual, dtype=torch.float32, num_slots=4, num_pages=160,
        max_pages=32, seed=0, workspace_tokens=DEFAULT_WORKSPACE_TOKENS,
    ):  # fmt: skip
        first = formats[0].key
        self.formats, self.page, self.head_dim = formats, first.page_size, first.head_dim
        self.heads, self.kv_heads, self.residual, self.dtype = heads, kv_heads, residual, dtype
        self.storage = CacheStorage.allocate(
            formats,
            num_pages=num_pages,
            num_slots=num_slots,
            ring_length=(-(-residual // self.page) + 1) * self.page,
            residual_length=residual,
            kv_heads=kv_heads,
            dtype=dtype,
            device="cpu",
        )
        self.workload = Workload.over(
            self.storage, heads=heads, most_pages=max_pages, workspace_tokens=workspace_tokens
        )
        self.kernels = make_kernels(self.storage, self.workload)
        self.fill = self.kernels  # stores what steps without attention add
        self.table = RequestTable(self.page, num_slots, num_pages, max_pages, seed)
        self.planner = self.kernels.planner_class(
            page_size=self.page,
            residual_length=residual,
            req_to_token=self.table.req_to_token,
            req_generation=self.table.req_generation,
        )
        self.requests = {}
        self.blocks = {}  # (page, layer, 0 for K or 1 for V) to its block
        self.sinks = {}  # the same keys to the first tokens of the sequence that began with the page
        self.shared = set()  # pages that a later request found
        self._generator = torch.Generator().manual_seed(seed)
        # Channels differ in size and offset, as keys do.
        self.size, self.offset = torch.rand(2, kv_heads, self.head_dim, generator=self._generator) * 2

    def begin_all(self, lengths):
        """A request of each length in slots 1, 2, …"""
        for slot, length in enumerate(lengths, start=1):
            self.begin(slot)
            if length:
                self.step((slot, length), attend=False)

    def random(self, *shape):
        return torch.randn(*shape, generator=self._generator)

    def rows(self, count):
        """New K and V of all layers, [count, layers, 2, kv_heads, head_dim]."""
        x = self.random(count, len(self.formats), 2, self.kv_heads, self.head_dim)
        return (x * self.size + self.offset).to(self.dtype)

    def begin(self, slot, prefix_of=None, prefix_pages=0):
        """Put a new request into the slot; its prefix is the first whole pages of another slot's request."""
        tokens, pages = self.rows(0), []
        if prefix_of is not None:
            prefix_pages = min(prefix_pages, len(self.requests[prefix_of]) // self.page)
            tokens = self.requests[prefix_of].tokens[: prefix_pages * self.page]
            pages = self.table.pages[prefix_of][:prefix_pages]
            self.shared.update(pages)
        if slot in self.requests:
            self.table.free([p for p in self.table.pages[slot] if p not in self.shared])
        self.table.begin(slot, pages)
        self.requests[slot] = Request(tokens)

    def step(self, *batch, attend=True, new=None):
        """One step of (slot, new tokens) pairs: attend, compare, store, compare what is stored.

        Returns the largest error of an output row, relative to its norm; 0 without ``attend``.
        """
        slots, counts = zip(*batch, strict=True)
        requests = [self.requests[slot] for slot in slots]
        for slot, request, count in zip(slots, requests, counts, strict=True):
            self.table.extend(slot, len(request) + count)
        plan = (self.kernels if attend else self.fill).plan(
            self.planner.plan(slots, [len(r) for r in requests], counts)
        )
        new = self.rows(sum(counts)) if new is None else new
        scaling, worst = self.head_dim**-0.5, 0.0
        for layer in range(len(self.formats)):
            k, v = new[:, layer].unbind(1)
            if attend:
                q = (self.random(sum(counts), self.heads, self.head_dim) * 2).to(self.dtype)
                out = self.kernels.attend(layer, plan, q, k, v, scaling)
                assert out.shape == q.shape and out.dtype == q.dtype
                for request, rows in zip(requests, _slices(counts), strict=True):
                    seen = [torch.cat([self.seen(request, layer, i), x[rows].float()]) for i, x in enumerate((k, v))]
                    expected = naive_attention(q[rows], *seen, scaling)
                    error = (out[rows].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
                    worst = max(worst, float("inf") if error.isnan().any() else error.max().item())
            (self.kernels if attend else self.fill).store(layer, plan, k, v)
        for slot, request, rows in zip(slots, requests, _slices(counts), strict=True):
            before = len(request)
            request.tokens = torch.cat([request.tokens, new[rows]])
            self._expect_pages(slot, before, len(request))
        return worst

    def seen(self, request, layer, half):
        """What a step must read of earlier tokens, float32: every position by the rule of the residual window."""
        tokens, fmt = request.tokens[:, layer, half], self._half(layer, half)
        result = tokens.float().clone()
        for first in range(0, len(request), self.page):
            if first < request.found or first + self.page <= len(request) - self.residual:
                block = pack_pages(tokens[first : first + self.page].transpose(0, 1), fmt)
                result[first : first + self.page] = unpack_pages(block, fmt).transpose(0, 1)
        sinks = self.formats[layer].sink_length
        result[:sinks] = tokens[:sinks].float()  # in packed pages or not
        return result

    def check(self):
        """Every page and sink holds what it was last filled with, every ring its request's newest tokens; all others, and
        padding, are untouched."""
        for layer, buffers in enumerate(self.storage.layers):
            for half, stored in enumerate((buffers.key, buffers.value)):
                pages, sinks = torch.zeros_like(stored.pages), torch.zeros_like(stored.sinks)
                for (page, of_layer, of_half), block in self.blocks.items():
                    if (of_layer, of_half) == (layer, half):
                        pages[page] = block
                for (page, of_layer, of_half), rows in self.sinks.items():
                    if (of_layer, of_half) == (layer, half):
                        sinks[page] = rows
                assert torch.equal(stored.pages, pages), (layer, half)
                assert torch.equal(stored.sinks, sinks), (layer, half)
                for slot, request in self.requests.items():
                    kept = range(max(request.found, len(request) - self.storage.ring_length), len(request))
                    ring = stored.ring[slot, [p % self.storage.ring_length for p in kept]]
                    assert torch.equal(ring, request.tokens[kept.start :, layer, half]), (layer, half, slot)

    def _half(self, layer, half):
        return (self.formats[layer].key, self.formats[layer].value)[half]

    def _expect_pages(self, slot, before, end):
        for index in range(before // self.page, end // self.page):
            tokens, page = self.requests[slot].tokens[index * self.page :][: self.page], self.table.pages[slot][index]
            for layer in range(len(self.formats)):
                for half in range(2):
                    rows, fmt = tokens[:, layer, half], self._half(layer, half)
                    self.blocks[page, layer, half] = pack_pages(rows.transpose(0, 1), fmt)
                    if index == 0:
                        self.sinks[page, layer, half] = rows[: self.formats[layer].sink_length]


def _slices(counts):
    start = 0
    for count in counts:
        yield slice(start, start + count)
        start += count
