"""Attention of prefill chunks: earlier tokens are dequantized into a workspace of bounded size, and upstream's Triton kernel
attends to it.

A prefix that the workspace does not hold comes in rounds. The prefixes of all requests lie end to end; round r has tokens
[r * tokens, (r + 1) * tokens) of that row, which is a part, maybe none, of each request's prefix. Each round gives a partial
result with its log-sum-exp, which is merged into what the chunk's own keys gave. Logarithms are natural here, as upstream's
kernel has them; those of decode steps (triton_attend.py) are to base 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from sglang.kernels.ops.attention.kvtuner import triton_launch as launch
from sglang.kernels.ops.attention.kvtuner.triton_gather import gather_kernel
from sglang.kernels.ops.attention.kvtuner.triton_merge import merge_into_kernel
from sglang.srt.kvtuner.attention.steps import StepPlan
from sglang.srt.kvtuner.cache.storage import CacheStorage

# Queries whose partial results over a round are held at once.
QUERY_BLOCK = 2048


@dataclass(frozen=True)
class ExtendPlan:
    """A step with several tokens of a request, and where its prefixes lie.

    prefix_start: int32 [requests + 1], where each prefix begins when all lie end to end. prefix_tokens: all of them.
    most_prefix: the longest. query_tokens: rows of the batch.
    """

    step: StepPlan
    prefix_start: torch.Tensor
    prefix_tokens: int
    most_prefix: int

    @classmethod
    def of(cls, step: StepPlan) -> ExtendPlan:
        lens = step.prefix_lens.tolist() if step.host_prefix_lens is None else step.host_prefix_lens
        start = torch.zeros_like(step.query_start)
        torch.cumsum(step.prefix_lens, 0, out=start[1:])
        return cls(step, start, sum(lens), max(lens))


class Workspace:
    """Room for dequantized keys and values of ``tokens`` tokens, shared by all layers.

    dtype: of products; q, k and v are brought to it.
    """

    def __init__(self, storage: CacheStorage, tokens: int, dtype: torch.dtype) -> None:
        self._storage, self._tokens = storage, tokens
        shape = (2, tokens, storage.kv_heads, storage.head_dim)
        self._rows = torch.empty(shape, dtype=dtype, device=storage.device)
        self._tile = launch.tile_tokens(storage.page_size, storage.head_dim, dtype.itemsize)

    @staticmethod
    def bytes_of(tokens: int, *, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
        """Of the workspace, and of a block's partial results over a round."""
        return 2 * tokens * kv_heads * head_dim * itemsize + QUERY_BLOCK * heads * (head_dim + 1) * 4

    def attend(
        self, layer: int, plan: ExtendPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write causal attention of q over the prefixes and k, v to ``out`` [tokens, heads, head_dim], contiguous and in the
        workspace's dtype."""
        rows = [x.to(out.dtype) for x in (q, k, v)]
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in rows)
        step, most = plan.step, plan.step.most_queries
        if plan.prefix_tokens <= self._tokens:
            if plan.prefix_tokens:
                self._gather(layer, plan, 0)
            self._attend(
                q, k, v, out, step.query_start, plan.prefix_start, most, scaling, skip_prefix=not plan.prefix_tokens
            )
            return
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        self._attend(q, k, v, out, step.query_start, plan.prefix_start, most, scaling, lse, skip_prefix=True)
        part_out = torch.empty((min(QUERY_BLOCK, q.shape[0]), *q.shape[1:]), dtype=torch.float32, device=q.device)
        part_lse = torch.empty(part_out.shape[:2], dtype=torch.float32, device=q.device)
        for window in range(0, plan.prefix_tokens, self._tokens):
            self._gather(layer, plan, window)
            prefix_start = (plan.prefix_start - window).clamp(0, self._tokens)
            for start, end, query_start in _blocks(step.query_start, q.shape[0]):
                own, count = slice(start, end), end - start
                parts = (part_out[:count], part_lse[:count])
                self._attend(
                    q[own], k[own], v[own], parts[0], query_start, prefix_start, min(most, count), scaling, parts[1],
                    skip_extend=True,
                )  # fmt: skip
                merge_into_kernel[(count * q.shape[1],)](out[own], lse[own], *parts, HEAD_DIM=q.shape[2])

    def _gather(self, layer: int, plan: ExtendPlan, window: int) -> None:
        storage, step = self._storage, plan.step
        of_page = triton.cdiv(storage.page_size, self._tile)
        # A window can begin and end within a page.
        pages = triton.cdiv(min(plan.most_prefix, self._tokens), storage.page_size) + 1
        buffers = storage.layers[layer]
        for half, rows in zip((buffers.key, buffers.value), self._rows, strict=True):
            gather_kernel[(step.slots.shape[0], pages * of_page, storage.kv_heads)](
                half.pages, half.ring, half.sinks, step.slots, step.prefix_lens, plan.prefix_start, step.packed_end,
                step.pages, step.pages.stride(0), window, self._tokens, rows, half.format, KV_HEADS=storage.kv_heads,
                RING=storage.ring_length, SINKS=half.sinks.shape[1], TOKENS=self._tile, **launch.GATHER,
            )  # fmt: skip

    def _attend(self, q, k, v, out, query_start, prefix_start, most_queries, scaling, lse=None, **parts: bool) -> None:
        # Imported here: everything else runs without upstream.
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

        extend_attention_fwd(
            q, k, v, out, *self._rows, query_start, prefix_start, kv_indices=None, custom_mask=None, is_causal=True,
            mask_indptr=None, max_len_extend=most_queries, k_scale=1.0, v_scale=1.0, sm_scale=scaling, lse_extend=lse,
            identity_kv_indices=True, **parts,
        )  # fmt: skip


def _blocks(query_start: torch.Tensor, tokens: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Rows of the batch in blocks: begin, end, and where in the block each request's queries begin."""
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, tokens)
        yield start, end, query_start.clamp(start, end) - start
