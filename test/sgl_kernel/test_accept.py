"""Accepted tokens gathered into compact lists, against loops."""

import pytest
import torch

from sgl_kernel import fill_accept_out_cache_loc_cpu, fill_bonus_tokens_cpu


def test_accepted_slots_are_packed_in_order():
    accept_index = torch.tensor([[0, 2, -1], [4, -1, -1], [6, 7, 8]], dtype=torch.int32)
    slots = torch.arange(100, 109)
    packed = torch.zeros(9, dtype=torch.int64)
    fill_accept_out_cache_loc_cpu(accept_index, slots, packed)
    expected = [int(slots[index]) for index in accept_index.flatten().tolist() if index != -1]
    assert packed.tolist() == expected + [0] * 3


def test_nothing_accepted_leaves_the_output():
    packed = torch.full((3,), 5)
    fill_accept_out_cache_loc_cpu(torch.full((1, 3), -1), torch.arange(3), packed)
    assert packed.tolist() == [5, 5, 5]


def test_an_index_beyond_the_tokens_is_refused():
    with pytest.raises(ValueError, match="beyond the 3 verified tokens"):
        fill_accept_out_cache_loc_cpu(torch.tensor([3]), torch.arange(3), torch.zeros(3).long())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_bonus_token_is_the_last_accepted(dtype):
    tokens = torch.arange(12, dtype=torch.int32).view(3, 4) * 10
    lengths = torch.tensor([1, 4, 2], dtype=dtype)
    bonus = torch.empty(3, dtype=torch.int32)
    fill_bonus_tokens_cpu(tokens, lengths, bonus, 4)
    assert bonus.tolist() == [int(tokens[row, int(length) - 1]) for row, length in enumerate(lengths)]


@pytest.mark.parametrize("length", [0, 5])
def test_a_length_out_of_range_is_refused(length):
    with pytest.raises(ValueError, match="not all from 1 to 4"):
        fill_bonus_tokens_cpu(torch.zeros(4), torch.tensor([length]), torch.empty(1, dtype=torch.int32), 4)
