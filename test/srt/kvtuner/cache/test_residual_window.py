"""Who may be asked for what when a slot changes hands."""

import pytest
import torch

from sglang.srt.kvtuner.cache.residual_window import RingOwners


def owners(num_slots=4):
    return RingOwners(num_slots, torch.device("cpu"))


def take_over(rings, *requests):
    """Requests are (slot, generation, prefix length)."""
    slots, generations, prefix_lens = zip(*requests, strict=True)
    rings.take_over(slots, generations, prefix_lens, page_size=8)
    return rings.start.tolist()


def test_a_new_request_starts_where_its_prefix_ends():
    assert take_over(owners(), (1, 1, 64)) == [0, 64, 0, 0]


def test_the_start_stays_while_the_request_does():
    rings = owners()
    take_over(rings, (1, 1, 64))
    for prefix_len in (100, 101, 200):
        assert take_over(rings, (1, 1, prefix_len)) == [0, 64, 0, 0]


def test_the_next_request_of_a_slot_starts_anew():
    rings = owners()
    take_over(rings, (2, 1, 0))
    take_over(rings, (2, 1, 500))
    assert take_over(rings, (2, 2, 128)) == [0, 0, 128, 0]
    assert take_over(rings, (2, 5, 0)) == [0, 0, 0, 0]  # generations may be skipped


def test_slots_are_independent():
    rings = owners()
    assert take_over(rings, (1, 1, 16), (3, 1, 32)) == [0, 16, 0, 32]
    assert take_over(rings, (3, 1, 40), (2, 7, 8)) == [0, 16, 8, 32]


def test_the_first_generation_counts_as_new():
    """Upstream's padding row keeps generation 0 for ever."""
    assert take_over(owners(1), (0, 0, 48)) == [48]


def test_the_tensor_stays_where_it_is():
    """Captured graphs hold its address."""
    rings = owners()
    address = rings.start.data_ptr()
    take_over(rings, (1, 1, 64))
    assert rings.start.data_ptr() == address and rings.start.dtype == torch.int32


def test_a_prefix_that_ends_inside_a_page_is_an_error():
    """Its last tokens would be in neither store."""
    with pytest.raises(AssertionError, match="slot 2 starts in the middle of a page"):
        take_over(owners(), (2, 1, 17))
