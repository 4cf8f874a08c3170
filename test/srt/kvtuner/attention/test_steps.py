"""Plans of steps against a model that only knows which position each ring row was last written for."""

import random

import pytest
import torch

from harness.cache import RequestTable, mixed_format
from sglang.srt.kvtuner.attention.steps import StepPlanner
from sglang.srt.kvtuner.cache.residual_window import ResidualWindow


class Positions:
    """A planner, and the position that every ring row holds: what a step may read is what was put there."""

    def __init__(self, page_size, residual, num_slots=4):
        self.plan = mixed_format(page_size, residual)
        self.table = RequestTable(page_size, num_slots, num_pages=500, max_pages=100)
        window = ResidualWindow(
            self.plan, num_layers=0, num_slots=num_slots, kv_heads=1, head_dim=16, dtype=torch.float32, device="cpu"
        )
        self.planner = StepPlanner(self.plan, window, self.table)
        self.ring = torch.full((num_slots, window.length), -1)
        self.start = [0] * num_slots
        self.length = [0] * num_slots

    def begin(self, slot, prefix=0):
        self.table.free(self.table.pages[slot])
        self.table.begin(slot)
        self.table.extend(slot, prefix)
        self.ring[slot] = -1  # of another request
        self.start[slot] = self.length[slot] = prefix

    def step(self, *batch):
        """Plan one step of (slot, new tokens) pairs and check every part of it; returns the steps."""
        slots, news = zip(*batch)
        priors = [self.length[slot] for slot in slots]
        for slot, prior, new in zip(slots, priors, news):
            self.table.extend(slot, prior + new)
        steps = self.planner.plan_batch(list(slots), priors, list(news))
        first_row = 0
        for step, slot, prior, new in zip(steps, slots, priors, news, strict=True):
            assert (step.slot, step.prior, step.new) == (slot, prior, new)
            assert (step.tokens.start, step.tokens.stop) == (first_row, first_row + new)
            first_row += new
            self._check_reads(step)
            self._check_writes(step)
        return steps

    def _check_reads(self, step):
        page, residual, slot = self.plan.page_size, self.plan.residual_length, step.slot
        # A position is read packed where its page is wholly older than the window, or was found in the prefix cache.
        packed = [
            p for p in range(step.prior) if p < self.start[slot] or (p // page + 1) * page <= step.prior - residual
        ]
        assert packed == list(range(step.packed_end))
        assert step.packed_pages.tolist() == self.table.pages[slot][: step.packed_end // page]
        assert self.ring[slot, step.prior_rows].tolist() == list(range(step.packed_end, step.prior))
        assert self.ring[slot, step.open_rows].tolist() == list(range(step.prior // page * page, step.prior))

    def _check_writes(self, step):
        page, slot, end = self.plan.page_size, step.slot, step.prior + step.new
        completed = [i for i in range(end // page) if (i + 1) * page > step.prior]
        assert step.completed_pages.tolist() == [self.table.pages[slot][i] for i in completed]
        kept = step.kept_rows.tolist()
        assert len(kept) == len(set(kept)) == min(step.new, self.ring.shape[1])
        self.ring[slot, step.kept_rows] = torch.arange(end - len(kept), end)
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
    assert model.planner._window.length == 48
    model.begin(1)
    if prior:
        model.step((1, prior))
    (step,) = model.step((1, chunk))
    assert step.kept_rows.numel() == 48
    for _ in range(40):
        model.step((1, 1))


def test_a_prefix_is_read_packed_even_inside_the_window():
    model = Positions(16, 100)
    model.begin(1, prefix=64)
    (step,) = model.step((1, 5))
    assert step.packed_end == 64 and step.prior_rows.numel() == 0
    (step,) = model.step((1, 1))
    assert step.packed_end == 64 and step.prior_rows.numel() == 5


def test_a_prefix_is_forgotten_with_its_request():
    model = Positions(16, 100)
    model.begin(1, prefix=64)
    model.step((1, 40))
    model.begin(1)
    model.step((1, 40))
    (step,) = model.step((1, 1))
    assert step.packed_end == 0 and step.prior_rows.numel() == 40


def test_a_window_longer_than_the_request_reads_no_page():
    model = Positions(16, 1000)
    model.begin(1)
    for _ in range(100):
        (step,) = model.step((1, 3))
        assert step.packed_end == 0 and step.packed_pages.numel() == 0


def test_a_prefix_that_ends_inside_a_page_is_an_error():
    """Its last tokens would be in neither store."""
    model = Positions(16, 16)
    model.table.begin(2)
    model.table.extend(2, 32)
    with pytest.raises(AssertionError, match="slot 2 starts in the middle of a page"):
        model.planner.plan_batch([2], [17], [1])


def test_an_empty_batch():
    assert Positions(16, 16).planner.plan_batch([], [], []) == []


def test_index_tensors_are_int64():
    model = Positions(16, 16)
    model.begin(1)
    model.step((1, 50))
    (step,) = model.step((1, 20))
    for name in ("packed_pages", "prior_rows", "open_rows", "completed_pages", "kept_rows"):
        assert getattr(step, name).dtype == torch.int64, name
