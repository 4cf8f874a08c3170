"""Rings: rows, bytes, and who may be asked for what when a slot changes hands."""

import pytest
import torch

from harness.cache import mixed_format
from sglang.srt.kvtuner.cache.residual_window import ResidualWindow, RingLedger


def window(residual=20, page_size=16, num_layers=2, num_slots=5, dtype=torch.bfloat16):
    cache_format = mixed_format(page_size, residual)
    shape = dict(num_layers=num_layers, num_slots=num_slots, kv_heads=3, head_dim=16)
    return ResidualWindow(cache_format, **shape, dtype=dtype, device="cpu")


class TestRingLedger:
    def test_a_new_request_starts_where_its_prefix_ends(self):
        ledger = RingLedger(3)
        assert ledger.start(1, generation=1, prior=64) == 64

    def test_the_start_stays_while_the_request_does(self):
        ledger = RingLedger(3)
        ledger.start(1, generation=1, prior=64)
        assert [ledger.start(1, generation=1, prior=prior) for prior in (100, 101, 200)] == [64] * 3

    def test_the_next_request_of_a_slot_starts_anew(self):
        ledger = RingLedger(3)
        ledger.start(2, generation=1, prior=0)
        ledger.start(2, generation=1, prior=500)
        assert ledger.start(2, generation=2, prior=128) == 128
        assert ledger.start(2, generation=5, prior=0) == 0  # generations may be skipped

    def test_slots_are_independent(self):
        ledger = RingLedger(3)
        ledger.start(1, generation=1, prior=16)
        ledger.start(2, generation=1, prior=32)
        assert ledger.start(1, generation=1, prior=40) == 16
        assert ledger.start(2, generation=1, prior=40) == 32

    def test_the_first_generation_counts_as_new(self):
        """Upstream's padding row keeps generation 0 for ever."""
        assert RingLedger(1).start(0, generation=0, prior=48) == 48


def test_rows_wrap_around():
    ring = window()
    assert ring.length == 48
    assert ring.rows(0, 3).tolist() == [0, 1, 2]
    assert ring.rows(46, 50).tolist() == [46, 47, 0, 1]
    assert ring.rows(480, 481).tolist() == [0]
    assert ring.rows(7, 7).tolist() == []


@pytest.mark.parametrize("start", (0, 1, 47, 1000))
def test_a_full_ring_has_every_row_once(start):
    ring = window()
    assert sorted(ring.rows(start, start + ring.length).tolist()) == list(range(ring.length))


def test_more_tokens_than_the_ring_holds_are_refused():
    ring = window()
    with pytest.raises(AssertionError):
        ring.rows(0, ring.length + 1)


@pytest.mark.parametrize("dtype, itemsize", [(torch.bfloat16, 2), (torch.float16, 2), (torch.float32, 4)])
def test_buffers(dtype, itemsize):
    ring = window(num_layers=3, num_slots=5, dtype=dtype)
    assert len(ring.keys) == len(ring.values) == 3
    for buffer in (*ring.keys, *ring.values):
        assert buffer.shape == (5, 48, 3, 16) and buffer.dtype == dtype
    assert len({buffer.data_ptr() for buffer in (*ring.keys, *ring.values)}) == 6, "no two layers share a ring"
    assert ring.size_bytes() == 2 * 3 * 5 * 48 * 3 * 16 * itemsize
