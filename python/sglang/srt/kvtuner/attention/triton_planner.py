"""Plans of decode steps by one kernel, into buffers whose addresses stay: what CUDA graphs replay."""

from __future__ import annotations

from typing import Any

import torch
import triton

from sglang.kernels.ops.attention.kvtuner.triton_launch import PLAN_PAGES
from sglang.kernels.ops.attention.kvtuner.triton_plan import plan_decode_kernel
from sglang.srt.kvtuner.attention.steps import StepPlan, StepPlanner
from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory

# Columns of an extend's plan while it is made and read, of 4 bytes a request: slots, lengths, sums, what becomes of them.
_EXTEND_COLUMNS = 24


class TritonPlanner(StepPlanner):
    """As :class:`StepPlanner`. A decode plan holds until the next one is made: all of them share their buffers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.max_rows = 0
        self.allocate(self.req_to_token.shape[0])

    @staticmethod
    def memory(most_pages: int) -> tuple[KernelMemory, ...]:
        """Of the buffers, and of what an extend's plan takes until the next one is made; for requests of up to ``most_pages``."""
        # query_start, prefix_lens, packed_end, a ring's start; query_start has one element more.
        held = KernelMemory("decode plans", 4, 4 * (4 + most_pages))
        return held, KernelMemory("prefill plans", 4 * _EXTEND_COLUMNS, 4 * (_EXTEND_COLUMNS + most_pages))

    def allocate(self, max_rows: int) -> None:
        """Make buffers for decode steps of up to ``max_rows`` requests, padding included, unless there is room for them. Not
        after a graph was captured."""
        if max_rows <= self.max_rows:
            return
        device = self.req_to_token.device
        self.max_rows = max_rows
        self._most_pages = self.req_to_token.shape[1] // self.page_size
        self._query_start = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._prefix_lens = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._packed_end = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._pages = torch.zeros(max_rows, self._most_pages, dtype=torch.int32, device=device)

    def plan_decode(self, slots: torch.Tensor, seq_lens: torch.Tensor, most_tokens: int | None = None) -> StepPlan:
        """As the parent's; one launch, the same whatever ``most_tokens`` is. Raises ValueError for more requests than
        :meth:`allocate` made room for."""
        rows = slots.shape[0]
        if rows > self.max_rows:
            raise ValueError(f"a decode step of {rows} requests; the planner has room for {self.max_rows}")
        plan_decode_kernel[(rows, max(triton.cdiv(self._most_pages, PLAN_PAGES), 1))](
            slots, seq_lens, self.req_to_token, self.req_to_token.stride(0), self.rings.start,
            self._prefix_lens, self._packed_end, self._pages, self._pages.stride(0),
            PAGE=self.page_size, RESIDUAL=self.residual_length, BLOCK=PLAN_PAGES,
        )  # fmt: skip
        return StepPlan(
            slots=slots,
            query_start=self._query_start[: rows + 1],
            prefix_lens=self._prefix_lens[:rows],
            packed_end=self._packed_end[:rows],
            pages=self._pages[:rows],
            most_queries=1,
        )
