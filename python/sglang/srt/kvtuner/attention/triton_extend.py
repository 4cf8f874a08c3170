"""Attention of prefill chunks: earlier tokens are dequantized into a workspace of bounded size, and upstream's Triton kernel
attends to it.

A prefix that the workspace does not hold comes in rounds. The prefixes of all requests lie end to end. The queries are taken in
blocks; for each block the prefixes of its requests go through the workspace one part after the other. Each round gives a partial
result with its log-sum-exp, which is merged into what the chunk's own keys gave. All of that has buffers of a fixed size: what
is dequantized again for the next block costs a few percent of the block's attention. Logarithms are natural here, as upstream's
kernel has them; those of decode steps (triton_attend.py) are to base 2.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import triton

from sglang.kernels.ops.attention.kvtuner import triton_launch as launch
from sglang.kernels.ops.attention.kvtuner.triton_gather import gather_kernel
from sglang.kernels.ops.attention.kvtuner.triton_merge import merge_into_kernel
from sglang.srt.kvtuner.attention.base import Workload
from sglang.srt.kvtuner.attention.prefill_libraries import KeyRows, choose_library, most
from sglang.srt.kvtuner.attention.steps import StepPlan
from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory
from sglang.srt.kvtuner.cache.storage import CacheStorage

# Queries whose partial results over a round are held at once.
QUERY_BLOCK = 2048


@dataclass(frozen=True)
class Block:
    """Queries [start, end) of a batch that comes in rounds. The prefixes of their requests are the tokens
    [prefix_start, prefix_end) when all lie end to end."""

    start: int
    end: int
    prefix_start: int
    prefix_end: int


@dataclass(frozen=True)
class ExtendPlan:
    """A step with several tokens of a request, and where its prefixes lie.

    prefix_start: int32 [requests + 1], where each prefix begins when all lie end to end. host_prefix_start: the same on the host.
    host_query_start: the step's query_start on the host. keys: for a library that attends to the step, where the workspace
    holds them.
    """

    step: StepPlan
    prefix_start: torch.Tensor
    host_prefix_start: tuple[int, ...]
    host_query_start: tuple[int, ...]
    keys: KeyRows | None = None

    @classmethod
    def of(cls, step: StepPlan, most_keys: int = 0) -> ExtendPlan:
        """most_keys: tokens for which a library attends, 0 where none does."""
        lens = step.prefix_lens.tolist() if step.host_prefix_lens is None else step.host_prefix_lens
        rows = step.query_start.tolist() if step.host_query_start is None else step.host_query_start
        start = torch.zeros_like(step.query_start)
        torch.cumsum(step.prefix_lens, 0, out=start[1:])
        starts = (start, (0, *itertools.accumulate(lens)), tuple(rows))
        held = sum(lens) + rows[-1] <= most_keys
        return cls(step, *starts, KeyRows.of(step, *starts) if held else None)

    @property
    def prefix_tokens(self) -> int:
        """Of all prefixes."""
        return self.host_prefix_start[-1]

    @cached_property
    def most_prefix(self) -> int:
        """Of the longest prefix."""
        return most(self.host_prefix_start)

    def blocks(self) -> Iterator[Block]:
        """The step's queries, QUERY_BLOCK at a time."""
        rows = self.host_query_start
        for start in range(0, rows[-1], QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, rows[-1])
            first, last = bisect_right(rows, start) - 1, bisect_left(rows, end)
            yield Block(start, end, self.host_prefix_start[first], self.host_prefix_start[last])


class Workspace:
    """Room for dequantized keys and values, and for partial results, shared by all layers.

    dtype: of products; q, k and v are brought to it.
    """

    def __init__(self, storage: CacheStorage, workload: Workload, dtype: torch.dtype) -> None:
        self._storage, self._tokens = storage, workload.workspace_tokens
        library = choose_library(workload)
        self._library = library and library(workload, storage.device)
        kept = {"dtype": torch.float32, "device": storage.device}
        shape = (2, self._tokens, storage.kv_heads, storage.head_dim)
        self._rows = torch.empty(shape, dtype=dtype, device=storage.device)
        self._part_out = torch.empty(QUERY_BLOCK, workload.heads, storage.head_dim, **kept)
        # Of the block so far, and of a round.
        self._lse, self._part_lse = (torch.empty(QUERY_BLOCK, workload.heads, **kept) for _ in range(2))
        self._tile = launch.tile_tokens(storage.page_size, storage.head_dim, dtype.itemsize)

    @staticmethod
    def memory(workload: Workload, itemsize: int) -> tuple[KernelMemory, ...]:
        """Of the buffers, with products of ``itemsize`` bytes."""
        tokens, kv_heads, head_dim = workload.workspace_tokens, workload.kv_heads, workload.head_dim
        library = choose_library(workload)
        return (
            KernelMemory(f"prefill workspace of {tokens} tokens", 2 * tokens * kv_heads * head_dim * itemsize),
            KernelMemory("prefill partial results", QUERY_BLOCK * workload.heads * (head_dim + 2) * 4),
            # A library's, and where a step's own rows go: int64, while they are made three times.
            *((*library.memory(workload), KernelMemory("prefill rows", 3 * 8 * tokens)) if library else ()),
        )

    def plan(self, step: StepPlan) -> ExtendPlan:
        """What :meth:`attend` takes, once for all layers."""
        return ExtendPlan.of(step, self._tokens if self._library else 0)

    def attend(
        self, layer: int, plan: ExtendPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write causal attention of q over the prefixes and k, v to ``out`` [tokens, heads, head_dim], contiguous and in the
        workspace's dtype."""
        rows = [x.to(out.dtype) for x in (q, k, v)]
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in rows)
        if plan.keys and self._library:
            keys, values = (k, v) if plan.keys.own is None else self._gather_all(layer, plan, plan.keys, k, v)
            self._library.attend(plan.keys, q.contiguous(), keys, values, scaling, out)
            return
        if plan.prefix_tokens > self._tokens:
            for block in plan.blocks():
                self._attend_in_rounds(layer, plan, block, q, k, v, scaling, out)
            return
        if plan.prefix_tokens:
            self._gather(layer, plan, plan.prefix_start, 0, plan.prefix_tokens)
        _attend(
            q, k, v, out, self._rows, plan.step.query_start, plan.prefix_start, plan.step.most_queries, scaling,
            skip_prefix=not plan.prefix_tokens,
        )  # fmt: skip

    def _attend_in_rounds(
        self, layer: int, plan: ExtendPlan, block: Block, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        scaling: float, out: torch.Tensor,
    ) -> None:  # fmt: skip
        own, count, heads = slice(block.start, block.end), block.end - block.start, q.shape[1]
        all_rows, most_queries = plan.step.query_start, min(plan.step.most_queries, count)
        of_block = all_rows.clamp(block.start, block.end) - block.start
        # Rows of the chunk before the block are a prefix like any other, of the request that the block begins within.
        before = all_rows.clamp(max=block.start)
        q, out, lse = q[own], out[own], _first(self._lse, count, heads)
        _attend(q, k[own], v[own], out, (k, v), of_block, before, most_queries, scaling, lse)
        part_out, part_lse = _first(self._part_out, count, heads, q.shape[2]), _first(self._part_lse, count, heads)
        for window in range(block.prefix_start, block.prefix_end, self._tokens):
            tokens = min(self._tokens, block.prefix_end - window)
            self._gather(layer, plan, plan.prefix_start, window, tokens)
            prefix_start = (plan.prefix_start - window).clamp_(0, tokens)
            _attend(
                q, k[own], v[own], part_out, self._rows, of_block, prefix_start, most_queries, scaling,
                part_lse, skip_extend=True,
            )  # fmt: skip
            merge_into_kernel[(count * heads,)](out, lse, part_out, part_lse, HEAD_DIM=q.shape[2])

    def _gather_all(
        self, layer: int, plan: ExtendPlan, keys: KeyRows, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of prefixes and step, as ``keys`` says."""
        self._gather(layer, plan, keys.start, 0, keys.host_start[-1])
        for rows, own in zip(self._rows, (k, v), strict=True):
            rows.index_copy_(0, keys.own, own)
        return self._rows[0], self._rows[1]

    def _gather(self, layer: int, plan: ExtendPlan, start: torch.Tensor, window: int, tokens: int) -> None:
        """Dequantize prefixes, of which each begins at ``start``: what is in [window, window + tokens)."""
        storage, step = self._storage, plan.step
        of_page = triton.cdiv(storage.page_size, self._tile)
        # A window can begin and end within a page.
        pages = triton.cdiv(min(plan.most_prefix, tokens), storage.page_size) + 1
        buffers = storage.layers[layer]
        for half, rows in zip((buffers.key, buffers.value), self._rows, strict=True):
            gather_kernel[(step.slots.shape[0], pages * of_page, storage.kv_heads)](
                half.pages, half.ring, half.sinks, step.slots, step.prefix_lens, start, step.packed_end,
                step.pages, step.pages.stride(0), window, tokens, rows, half.format, KV_HEADS=storage.kv_heads,
                RING=storage.ring_length, SINKS=half.sinks.shape[1], TOKENS=self._tile, **launch.GATHER,
            )  # fmt: skip


def _first(buffer: torch.Tensor, *shape: int) -> torch.Tensor:
    """A contiguous tensor at the beginning of a buffer."""
    return buffer.view(-1)[: math.prod(shape)].view(shape)


def _attend(q, k, v, out, earlier, query_start, earlier_start, most_queries, scaling, lse=None, **parts: bool) -> None:
    """Causal attention over the rows k, v of the queries and over ``earlier`` (keys, values), in which each request's begin at
    ``earlier_start`` and end at the next one's; lse: natural, -inf without keys."""
    # Imported here: everything else runs without upstream.
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    extend_attention_fwd(
        q, k, v, out, *earlier, query_start, earlier_start, kv_indices=None, custom_mask=None, is_causal=True,
        mask_indptr=None, max_len_extend=most_queries, k_scale=1.0, v_scale=1.0, sm_scale=scaling, lse_extend=lse,
        identity_kv_indices=True, **parts,
    )  # fmt: skip
