"""What one forward step does to one request: which tokens it reads from where, and what it stores.

Before a step the request has ``prior`` tokens; the step adds ``new`` (a prefill chunk, or one token in decode). Its
queries see

* packed pages for positions [0, packed_end), with ``packed_end = max(page_floor(prior - residual), ring start)``,
* the ring for [packed_end, prior),
* the step's own keys and values, in full precision, causally.

It then packs every page that it completed and keeps its newest tokens in the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.srt.kvtuner.cache.residual_window import ResidualWindow
from sglang.srt.kvtuner.config.cache_format import CacheFormat


@dataclass(frozen=True)
class SequenceStep:
    """One request in one step.

    slot: request slot. tokens: its rows in the batch. prior, packed_end: see the module. packed_pages: page ids of
    [0, packed_end). prior_rows: ring rows of [packed_end, prior). open_rows: ring rows of the unfinished page's
    tokens before the step. completed_pages: page ids that the step fills. kept_rows: ring rows of the step's newest
    tokens. Index tensors are int64 on the cache's device.
    """

    slot: int
    tokens: slice
    prior: int
    packed_end: int
    packed_pages: torch.Tensor
    prior_rows: torch.Tensor
    open_rows: torch.Tensor
    completed_pages: torch.Tensor
    kept_rows: torch.Tensor

    @property
    def new(self) -> int:
        return self.tokens.stop - self.tokens.start


@dataclass(frozen=True)
class BatchPlan:
    """A whole step as kernels take it, on the host.

    sequences: int64 [batch, 6]: request slot, first row in the batch, new tokens, prior tokens, packed_end, and where its
    entries of ``pages`` begin. pages: int32, page ids of every whole page that the request has after the step.
    """

    sequences: torch.Tensor
    pages: torch.Tensor


class StepPlanner:
    """Builds the steps of a batch from host-side lengths and upstream's request-to-token table."""

    def __init__(self, plan: CacheFormat, window: ResidualWindow, req_to_token_pool) -> None:
        self._page_size = plan.page_size
        self._residual = plan.residual_length
        self._window = window
        self._table = req_to_token_pool.req_to_token
        self._generation = req_to_token_pool.req_generation
        self._device = self._table.device

    def plan_batch(self, slots: list[int], priors: list[int], news: list[int]) -> list[SequenceStep]:
        """Steps of a batch: request slots, tokens before the step, tokens of the step."""
        steps, offset = [], 0
        for slot, prior, new in zip(slots, priors, news, strict=True):
            steps.append(self._plan_sequence(slot, prior, slice(offset, offset + new)))
            offset += new
        return steps

    def plan_flat(self, slots: list[int], priors: list[int], news: list[int]) -> BatchPlan:
        """The same steps as :meth:`plan_batch`, in the form for kernels."""
        page = self._page_size
        whole = max((prior + new for prior, new in zip(priors, news, strict=True)), default=0) // page
        pages = self._table[slots, : whole * page : page] // page if whole else torch.zeros(len(slots), 0)
        rows, offset = [], 0
        for i, (slot, prior, new) in enumerate(zip(slots, priors, news, strict=True)):
            rows.append((slot, offset, new, prior, self._packed_end(slot, prior), i * whole))
            offset += new
        return BatchPlan(
            sequences=torch.tensor(rows, dtype=torch.int64).reshape(-1, 6), pages=pages.to(torch.int32).contiguous()
        )

    def _packed_end(self, slot: int, prior: int) -> int:
        page = self._page_size
        start = self._window.ledger.start(slot, int(self._generation[slot]), prior)
        # The prefix cache shares whole pages only; anything else would leave tokens in neither store.
        assert start % page == 0, f"slot {slot} starts in the middle of a page ({start} tokens)"
        return max((prior - self._residual) // page * page, start, 0)

    def _plan_sequence(self, slot: int, prior: int, tokens: slice) -> SequenceStep:
        page, window = self._page_size, self._window
        new = tokens.stop - tokens.start
        packed_end = self._packed_end(slot, prior)
        open_start = prior // page * page
        end = prior + new
        return SequenceStep(
            slot=slot,
            tokens=tokens,
            prior=prior,
            packed_end=packed_end,
            packed_pages=self._pages(slot, 0, packed_end),
            prior_rows=self._rows(packed_end, prior),
            open_rows=self._rows(open_start, prior),
            completed_pages=self._pages(slot, open_start, end // page * page),
            kept_rows=self._rows(max(prior, end - window.length), end),
        )

    def _pages(self, slot: int, start: int, end: int) -> torch.Tensor:
        first_tokens = self._table[slot, start : max(start, end) : self._page_size]
        return first_tokens.long() // self._page_size

    def _rows(self, start: int, end: int) -> torch.Tensor:
        return self._window.rows(start, end).to(self._device)
