"""What one forward step does to the requests of a batch: which tokens they read from where, and what they store.

Before a step a request has ``prefix_len`` tokens; the step adds ``query_len`` (a prefill chunk, or one token in decode). Its
queries see

* packed pages for positions [0, packed_end), with ``packed_end = max(page_floor(prefix_len - residual), ring start)``,
* the ring for [packed_end, prefix_len),
* the step's own keys and values, in full precision, causally.

It then packs every page that it completed and keeps its newest tokens in the ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from sglang.srt.kvtuner.cache.host_copy import to_device
from sglang.srt.kvtuner.cache.residual_window import RingOwners

# Marks what a plan says to the host alone: kernels do not get it.
ON_HOST = {"host": True}


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
    """One step of a batch, the same for all layers, on the cache's device.

    slots: int64 [requests], request slots. query_start: int32 [requests + 1], each request's first row in the batch, and the
    number of rows. prefix_lens, packed_end: int32 [requests]. pages: int32 [requests, most pages], page ids of every whole page
    that a request has after the step; what follows them is undefined. most_queries: the largest query_len; 1 in decode.
    host_prefix_lens: prefix_lens on the host, where it knows them: in extends.
    """

    slots: torch.Tensor
    query_start: torch.Tensor
    prefix_lens: torch.Tensor
    packed_end: torch.Tensor
    pages: torch.Tensor
    most_queries: int = field(metadata=ON_HOST)
    host_prefix_lens: tuple[int, ...] | None = field(default=None, metadata=ON_HOST)

    @cached_property
    def requests(self) -> list[RequestStep]:
        """The same, request by request, on the host."""
        rows = self.query_start.tolist()
        columns = (self.slots.tolist(), self.prefix_lens.tolist(), self.packed_end.tolist())
        return [
            RequestStep(row, slot, slice(rows[row], rows[row + 1]), prefix_len, packed_end)
            for row, (slot, prefix_len, packed_end) in enumerate(zip(*columns, strict=True))
        ]


class StepPlanner:
    """Builds the plans of a cache's steps from upstream's request-to-token table.

    req_to_token: int32 [slots, context], token slots of every request on the cache's device. req_generation: int64 [slots] on
    the host; it changes when a slot goes to another request.
    """

    def __init__(
        self, *, page_size: int, residual_length: int, req_to_token: torch.Tensor, req_generation: torch.Tensor
    ) -> None:
        self.page_size = page_size
        self.residual_length = residual_length
        self.req_to_token = req_to_token
        self.rings = RingOwners(req_to_token.shape[0], req_to_token.device)
        self._generation = req_generation

    def plan(self, slots: Sequence[int], prefix_lens: Sequence[int], query_lens: Sequence[int]) -> StepPlan:
        """The plan of an extend, of which the host knows everything: per request its slot, tokens before the step, tokens of
        the step."""
        generations = self._generation[list(slots)].tolist()
        self.rings.take_over(slots, generations, prefix_lens, page_size=self.page_size)
        query_start = [0, *itertools.accumulate(query_lens)]
        device = self.req_to_token.device
        step = self._make(
            to_device(slots, torch.int64, device),
            to_device(query_start, torch.int32, device),
            to_device(prefix_lens, torch.int32, device),
            max(query_lens, default=0),
            max(map(sum, zip(prefix_lens, query_lens, strict=True)), default=0),
        )
        return replace(step, host_prefix_lens=tuple(prefix_lens))

    def plan_decode(self, slots: torch.Tensor, seq_lens: torch.Tensor, most_tokens: int | None = None) -> StepPlan:
        """The plan of a decode step; nothing is asked of the host.

        slots, seq_lens: int64 [requests] on the device; seq_lens counts the step's own token. most_tokens: the largest of them
        where the host knows it; without it the plan has all pages that a request can have.
        """
        rows = slots.shape[0]
        query_start = torch.arange(rows + 1, dtype=torch.int32, device=slots.device)
        return self._make(slots, query_start, (seq_lens - 1).to(torch.int32), 1, most_tokens)

    def _make(
        self,
        slots: torch.Tensor,
        query_start: torch.Tensor,
        prefix_lens: torch.Tensor,
        most_queries: int,
        most_tokens: int | None,
    ) -> StepPlan:
        page = self.page_size
        whole = self.req_to_token.shape[1] if most_tokens is None else most_tokens // page * page
        aged = (prefix_lens - self.residual_length).clamp(min=0) // page * page
        return StepPlan(
            slots=slots,
            query_start=query_start,
            prefix_lens=prefix_lens,
            packed_end=torch.maximum(aged, self.rings.start[slots]),
            # Copied here, for all layers: while they run, the scheduler may already write the table for the next batch.
            pages=(self.req_to_token[:, :whole:page][slots] // page).to(torch.int32),
            most_queries=most_queries,
        )
