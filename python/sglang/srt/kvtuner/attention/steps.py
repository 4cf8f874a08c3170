"""What one forward step does to the requests of a batch: which tokens they read from where, and what they store.

Before a step a request has ``prefix_len`` tokens; the step adds ``query_len`` (a prefill chunk, or one token in decode). Its
queries see

* packed pages for positions [0, packed_end), with ``packed_end = max(page_floor(prefix_len - residual), ring start)``,
* the ring for [packed_end, prefix_len),
* the step's own keys and values, in full precision, causally.

It then packs every page that it completed and keeps its newest tokens in the ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from sglang.srt.kvtuner.cache.residual_window import RingLedger


@dataclass(frozen=True)
class RequestStep:
    """One request in one step: row ``row`` of the plan, queries ``queries`` of the batch; the rest as in the module."""

    row: int
    slot: int
    queries: slice
    prefix_len: int
    packed_end: int

    @property
    def end(self) -> int:
        """Tokens after the step."""
        return self.prefix_len + self.queries.stop - self.queries.start

    def completed_pages(self, page_size: int) -> range:
        """Pages that the step fills, counted from the start of the sequence."""
        return range(self.prefix_len // page_size, self.end // page_size)


@dataclass(frozen=True)
class StepPlan:
    """One step of a batch, the same for all layers.

    slots: int64 [requests], request slots. query_start: int32 [requests + 1], each request's first row in the batch, and the
    number of rows. prefix_lens, packed_end: int32 [requests]. pages: int32 [requests, most pages], page ids of every whole page
    that a request has after the step. ``pages`` is on the cache's device, the others are on the host.
    """

    slots: torch.Tensor
    query_start: torch.Tensor
    prefix_lens: torch.Tensor
    packed_end: torch.Tensor
    pages: torch.Tensor

    @cached_property
    def requests(self) -> list[RequestStep]:
        """The same, request by request."""
        rows = self.query_start.tolist()
        columns = (self.slots.tolist(), self.prefix_lens.tolist(), self.packed_end.tolist())
        return [
            RequestStep(row, slot, slice(rows[row], rows[row + 1]), prefix_len, packed_end)
            for row, (slot, prefix_len, packed_end) in enumerate(zip(*columns, strict=True))
        ]


class StepPlanner:
    """Builds the plans of a cache's steps from host-side lengths and upstream's request-to-token table.

    req_to_token: int32 [slots, context], token slots of every request on the cache's device. req_generation: int64 [slots] on
    the host; it changes when a slot goes to another request.
    """

    def __init__(
        self, *, page_size: int, residual_length: int, req_to_token: torch.Tensor, req_generation: torch.Tensor
    ) -> None:
        self._page_size = page_size
        self._residual_length = residual_length
        self._table = req_to_token
        self._generation = req_generation
        self._ledger = RingLedger(req_to_token.shape[0])

    def plan(self, slots: Sequence[int], prefix_lens: Sequence[int], query_lens: Sequence[int]) -> StepPlan:
        """The plan of a step: per request its slot, tokens before the step, tokens of the step."""
        query_start = [0]
        for query_len in query_lens:
            query_start.append(query_start[-1] + query_len)
        packed_end = [self._packed_end(*request) for request in zip(slots, prefix_lens, strict=True)]
        return StepPlan(
            slots=torch.tensor(slots, dtype=torch.int64),
            query_start=torch.tensor(query_start, dtype=torch.int32),
            prefix_lens=torch.tensor(prefix_lens, dtype=torch.int32),
            packed_end=torch.tensor(packed_end, dtype=torch.int32),
            pages=self._pages(slots, max(map(sum, zip(prefix_lens, query_lens, strict=True)), default=0)),
        )

    def _packed_end(self, slot: int, prefix_len: int) -> int:
        page = self._page_size
        start = self._ledger.start(slot, int(self._generation[slot]), prefix_len)
        # The prefix cache shares whole pages only; anything else would leave tokens in neither store.
        assert start % page == 0, f"slot {slot} starts in the middle of a page ({start} tokens)"
        return max((prefix_len - self._residual_length) // page * page, start, 0)

    def _pages(self, slots: Sequence[int], tokens: int) -> torch.Tensor:
        page = self._page_size
        whole = tokens // page * page
        rows = torch.tensor(slots, dtype=torch.int64).to(self._table.device)
        return (self._table[:, :whole:page][rows] // page).to(torch.int32).contiguous()
