"""Plans of steps against a model that only knows which position each ring row was last written for."""

import random

import pytest
import torch

from harness.cache import RequestTable
from sglang.srt.kvtuner.attention.steps import StepPlanner


class Positions:
    """A planner, and the position that every ring row holds: what a step may read is what was put there."""

    def __init__(self, page_size, residual, num_slots=4):
        self.page, self.residual = page_size, residual
        self.table = RequestTable(page_size, num_slots, num_pages=500, max_pages=100)
        self.planner = StepPlanner(
            page_size=page_size,
            residual_length=residual,
            req_to_token=self.table.req_to_token,
            req_generation=self.table.req_generation,
        )
        self.ring = torch.full((num_slots, (-(-residual // page_size) + 1) * page_size), -1)
        self.start = [0] * num_slots
        self.length = [0] * num_slots

    def begin(self, slot, prefix=0):
        self.table.free(self.table.pages[slot])
        self.table.begin(slot)
        self.table.extend(slot, prefix)
        self.ring[slot] = -1  # of another request
        self.start[slot] = self.length[slot] = prefix

    def step(self, *batch):
        """Plan one step of (slot, new tokens) pairs and check every part of it; returns the steps of its requests."""
        slots, counts = zip(*batch, strict=True)
        lengths = [self.length[slot] for slot in slots]
        for slot, length, count in zip(slots, lengths, counts, strict=True):
            self.table.extend(slot, length + count)
        plan = self.planner.plan(slots, lengths, counts)
        first = 0
        assert plan.most_queries == max(counts)
        if max(counts) == 1:
            self._check_decode(plan, slots, lengths)
        for row, (step, slot, length, count) in enumerate(zip(plan.requests, slots, lengths, counts, strict=True)):
            assert (step.row, step.slot, step.prefix_len, step.end) == (row, slot, length, length + count)
            assert step.queries == slice(first, first + count)
            first += count
            self._check_reads(step)
            self._check_writes(step, plan.pages[row].tolist())
        assert plan.query_start.tolist()[-1] == first
        return plan.requests

    def _check_decode(self, plan, slots, lengths):
        """The plan that is made on the device, with and without the host's help, is the same."""
        seq_lens = torch.tensor(lengths) + 1
        for most_tokens in (int(seq_lens.max()), None):
            other = self.planner.plan_decode(torch.tensor(slots), seq_lens, most_tokens)
            for name in ("slots", "query_start", "prefix_lens", "packed_end"):
                assert torch.equal(getattr(other, name), getattr(plan, name)), name
            assert torch.equal(other.pages[:, : plan.pages.shape[1]], plan.pages)
            assert other.most_queries == 1

    def _check_reads(self, step):
        # A position is read packed where its page is wholly older than the window, or was found in the prefix cache.
        oldest, start = step.prefix_len - self.residual, self.start[step.slot]
        packed = [p for p in range(step.prefix_len) if p < start or (p // self.page + 1) * self.page <= oldest]
        assert packed == list(range(step.packed_end))
        for position in range(step.packed_end, step.prefix_len):
            assert self.ring[step.slot, position % self.ring.shape[1]] == position
        # The unfinished page is packed from the ring.
        for position in range(step.prefix_len // self.page * self.page, step.prefix_len):
            assert self.ring[step.slot, position % self.ring.shape[1]] == position

    def _check_writes(self, step, page_ids):
        slot, end = step.slot, step.end
        completed = [i for i in range(end // self.page) if (i + 1) * self.page > step.prefix_len]
        assert list(step.completed_pages(self.page)) == completed
        assert page_ids[: end // self.page] == self.table.pages[slot][: end // self.page]
        for position in range(max(step.prefix_len, end - self.ring.shape[1]), end):
            self.ring[slot, position % self.ring.shape[1]] = position
        self.length[slot] = end


@pytest.mark.parametrize("page_size", (16, 32, 64))
@pytest.mark.parametrize("residual", (0, 1, 15, 63, 64, 65, 128, 5000))
def test_random_requests(page_size, residual):
    """Three slots at once: decodes, chunks of any size, and new requests with and without a prefix."""
    model, rng = Positions(page_size, residual), random.Random(page_size * 10_000 + residual)
    for slot in (1, 2, 3):
        model.begin(slot)
    for _ in range(80):
        chunks = (1, 1, 1, 2, 7, page_size, rng.randint(1, 90))
        model.step(*[(slot, rng.choice(chunks)) for slot in rng.sample((1, 2, 3), 2)])
        for slot in (1, 2, 3):
            if model.length[slot] > 500 or rng.random() < 0.03:
                model.begin(slot, prefix=rng.choice((0, 0, 1, 4)) * page_size)


@pytest.mark.parametrize("residual", (0, 16, 40))
def test_one_request_by_single_tokens(residual):
    model = Positions(16, residual)
    model.begin(1)
    for _ in range(200):
        model.step((1, 1))


@pytest.mark.parametrize("prior", (0, 1, 15, 16, 17, 100))
@pytest.mark.parametrize("chunk", (64, 65, 300))
def test_a_chunk_longer_than_the_ring(prior, chunk):
    model = Positions(16, 32)
    assert model.ring.shape[1] == 48
    model.begin(1)
    if prior:
        model.step((1, prior))
    [step] = model.step((1, chunk))
    assert step.end - step.prefix_len == chunk > 48
    for _ in range(40):
        model.step((1, 1))


def test_a_prefix_is_read_packed_even_inside_the_window():
    model = Positions(16, 100)
    model.begin(1, prefix=64)
    [step] = model.step((1, 5))
    assert (step.packed_end, step.prefix_len) == (64, 64)
    [step] = model.step((1, 1))
    assert (step.packed_end, step.prefix_len) == (64, 69)


def test_a_prefix_is_forgotten_with_its_request():
    model = Positions(16, 100)
    model.begin(1, prefix=64)
    model.step((1, 40))
    model.begin(1)
    model.step((1, 40))
    [step] = model.step((1, 1))
    assert (step.packed_end, step.prefix_len) == (0, 40)


def test_a_window_longer_than_the_request_reads_no_page():
    model = Positions(16, 1000)
    model.begin(1)
    for _ in range(100):
        [step] = model.step((1, 3))
        assert step.packed_end == 0


def test_a_prefix_that_ends_inside_a_page_is_an_error():
    """Its last tokens would be in neither store."""
    model = Positions(16, 16)
    model.table.begin(2)
    model.table.extend(2, 32)
    with pytest.raises(AssertionError, match="slot 2 starts in the middle of a page"):
        model.planner.plan([2], [17], [1])


def test_an_empty_batch():
    plan = Positions(16, 16).planner.plan((), (), ())
    assert plan.requests == [] and plan.query_start.tolist() == [0] and plan.pages.shape[0] == 0


def test_types_of_the_plan():
    model = Positions(16, 16)
    model.begin(1)
    model.step((1, 50))
    plan = model.planner.plan([1], [50], [20])
    found = {name: getattr(plan, name).dtype for name in ("slots", "query_start", "prefix_lens", "packed_end", "pages")}
    assert found.pop("slots") == torch.int64 and set(found.values()) == {torch.int32}
