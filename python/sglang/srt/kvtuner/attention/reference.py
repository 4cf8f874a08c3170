"""Attention over the packed cache in plain torch, on any device: the definition that every kernel is tested against."""

from __future__ import annotations

from typing import Any

import torch

from sglang.srt.kvtuner.attention.base import Kernels, Workload
from sglang.srt.kvtuner.attention.prefix import prefix_parts
from sglang.srt.kvtuner.attention.steps import RequestStep, StepPlan
from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory
from sglang.srt.kvtuner.cache.storage import TensorStorage
from sglang.srt.kvtuner.format import page_codec
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat

# Tokens whose keys and values are dequantized at once, and attention weights computed at once.
PART_TOKENS = 1024
MAX_WEIGHTS = 1 << 25


class ReferenceKernels(Kernels):
    """Every format on every device, in float32, request by request. It asks the device for nothing."""

    name = "torch reference"

    @classmethod
    def supports(cls, layer: LayerFormat) -> str | None:
        return None

    @classmethod
    def memory(cls, workload: Workload) -> tuple[KernelMemory, ...]:
        # In float32: keys and values of a part, with the copies that dequantizing makes; the weights of a block of queries,
        # with the mask; its queries, sums and results, each twice.
        heads, head_dim = workload.heads, workload.head_dim
        part = PART_TOKENS * workload.kv_heads * head_dim
        weights = max(MAX_WEIGHTS, heads * PART_TOKENS)
        queries = weights // PART_TOKENS * head_dim
        return (KernelMemory("dequantized parts", 4 * (8 * part + weights + weights // heads + 6 * queries)),)

    def attend(
        self, layer: int, plan: StepPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        for request in plan.requests:
            rows = request.queries
            for block in _query_blocks(rows, heads=q.shape[1]):
                softmax = RunningSoftmax(q[block], scaling)
                for keys, values in prefix_parts(self.storage, layer, request, plan.pages[request.row], PART_TOKENS):
                    softmax.add(keys, values)
                for start in range(rows.start, block.stop, PART_TOKENS):
                    own = slice(start, min(start + PART_TOKENS, block.stop))
                    softmax.add(k[own].float(), v[own].float(), diagonal=block.start - start)
                out[block] = softmax.result()
        return out

    def store(self, layer: int, plan: StepPlan, k: torch.Tensor, v: torch.Tensor) -> None:
        for request in plan.requests:
            page_ids = plan.pages[request.row]
            for half, rows in ((self.storage.layers[layer].key, k), (self.storage.layers[layer].value, v)):
                self._store(half, request, page_ids, rows[request.queries])

    @staticmethod
    def pack_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
        return page_codec.pack_pages(x, fmt)

    def _store(self, half: TensorStorage, request: RequestStep, page_ids: torch.Tensor, rows: torch.Tensor) -> None:
        page, length = self.storage.page_size, self.storage.ring_length
        ring = half.ring[request.slot]
        completed = request.completed_pages(page)
        if completed:
            ids = page_ids[completed.start : completed.stop].long()
            unfinished = self._ring_rows(completed.start * page, request.prefix_len)
            tokens = torch.cat([ring.index_select(0, unfinished), rows])[: len(completed) * page]
            if completed.start == 0:
                half.sinks.index_copy_(0, ids[:1], tokens[None, : half.sinks.shape[1]])
            for i in range(len(completed)):  # a page at a time, whatever the length of the chunk
                x = tokens[i * page : (i + 1) * page].transpose(0, 1)
                blocks = page_codec.pack_pages(x, half.format)
                self.storage.nonfinite_blocks.add_(page_codec.has_nonfinite(blocks, half.format).sum())
                half.pages.index_copy_(0, ids[i : i + 1], blocks[None])
        kept = min(rows.shape[0], length)
        ring.index_copy_(0, self._ring_rows(request.end - kept, request.end), rows[rows.shape[0] - kept :])

    def _ring_rows(self, start: int, end: int) -> torch.Tensor:
        return torch.arange(start, end, device=self.storage.device) % self.storage.ring_length


class RunningSoftmax:
    """Attention of some queries over keys that come in parts: the running maximum, sum and result of the softmax
    (FlashAttention, NeurIPS 2022, section 3.1).

    q: [tokens, heads, head_dim]; computed in float32.
    """

    def __init__(self, q: torch.Tensor, scaling: float) -> None:
        self._q, self._scaling = q, scaling
        self._max: Any = None

    def add(self, k: torch.Tensor, v: torch.Tensor, diagonal: int | None = None) -> None:
        """Attend to k and v, float32 [keys, kv_heads, head_dim], all of them or, with ``diagonal``, query i to the first
        ``diagonal + i + 1``."""
        tokens, _, head_dim = self._q.shape
        keys, kv_heads = k.shape[:2]
        q = self._q.float().view(tokens, kv_heads, -1, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_dim)
        logits = (q @ k.permute(1, 2, 0)).mul_(self._scaling)  # [kv_heads, group * tokens, keys]
        if diagonal is not None:
            hidden = torch.ones(tokens, keys, dtype=torch.bool, device=k.device).triu_(diagonal + 1)
            logits.unflatten(1, (-1, tokens)).masked_fill_(hidden, float("-inf"))
        highest = logits.amax(-1, keepdim=True)
        if self._max is not None:
            highest = torch.maximum(highest, self._max)
        weights = logits.sub_(highest).exp_()
        total, result = weights.sum(-1, keepdim=True), weights @ v.transpose(0, 1)
        if self._max is not None:
            earlier = (self._max - highest).exp_()
            total, result = total.addcmul_(self._sum, earlier), result.addcmul_(self._result, earlier)
        self._max, self._sum, self._result = highest, total, result

    def result(self) -> torch.Tensor:
        """float32 [tokens, heads, head_dim]."""
        tokens, heads, head_dim = self._q.shape
        out = (self._result / self._sum).view(-1, heads // self._result.shape[0], tokens, head_dim)
        return out.permute(2, 0, 1, 3).reshape(tokens, heads, head_dim)


def _query_blocks(rows: slice, heads: int) -> list[slice]:
    """Rows in blocks whose weights over a part of the keys are at most MAX_WEIGHTS."""
    most = max(MAX_WEIGHTS // (heads * PART_TOKENS), 1)
    return [slice(start, min(start + most, rows.stop)) for start in range(rows.start, rows.stop, most)]
