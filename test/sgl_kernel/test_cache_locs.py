"""Cache slots to and from the table of running requests, against loops."""

import pytest
import torch

from sgl_kernel import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
)

WIDTH = 24


def table(seed=0, rows=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 10_000, (rows, WIDTH), generator=generator, dtype=torch.int32)


RANGES = [
    pytest.param([3], [2], [9], id="one request"),
    pytest.param([5, 0, 2], [0, 4, 7], [4, 4, 24], id="an empty range and one to the end of the row"),
    pytest.param([], [], [], id="no request"),
]
INTEGERS = pytest.mark.parametrize("dtype", [torch.int32, torch.int64])


@INTEGERS
@pytest.mark.parametrize("rows, starts, ends", RANGES)
def test_assign_writes_each_range(rows, starts, ends, dtype):
    pool = table()
    expected = pool.clone()
    slots = torch.arange(20_000, 20_000 + sum(ends) - sum(starts) + 3)
    cell = 0
    for row, start, end in zip(rows, starts, ends):
        for position in range(start, end):
            expected[row, position] = slots[cell]
            cell += 1
    index = [torch.tensor(values, dtype=dtype) for values in (rows, starts, ends)]
    assign_req_to_token_pool_cpu(index[0], pool, index[1], index[2], slots, WIDTH)
    assert torch.equal(pool, expected)


@INTEGERS
@pytest.mark.parametrize("rows, starts, ends", RANGES)
def test_extend_reads_each_range_and_leaves_the_rest(rows, starts, ends, dtype):
    pool = table(1)
    out = torch.full((sum(ends) - sum(starts) + 4,), -7, dtype=torch.int64)
    expected = out.clone()
    cell = 0
    for row, start, end in zip(rows, starts, ends):
        for position in range(start, end):
            expected[cell] = pool[row, position]
            cell += 1
    index = [torch.tensor(values, dtype=dtype) for values in (rows, starts, ends)]
    assign_extend_cache_locs_cpu(index[0], pool, index[1], index[2], out, WIDTH)
    assert torch.equal(out, expected)


def test_draft_slots_follow_the_committed_tokens():
    pool, rows, lengths, topk, steps = table(2), [4, 1], [3, 15], 2, 3
    out = torch.zeros(len(rows) * topk * steps, dtype=torch.int64)
    assign_draft_cache_locs_contiguous_cpu(torch.tensor(rows), pool, torch.tensor(lengths), out, WIDTH, topk, steps)
    expected = [int(pool[row, length + i]) for row, length in zip(rows, lengths) for i in range(topk * steps)]
    assert out.tolist() == expected


@pytest.mark.parametrize(
    "rows, starts, ends, room, message",
    [
        ([0], [3], [2], 9, "not all ranges"),
        ([0], [20], [25], 9, "not all ranges"),
        ([6], [0], [2], 9, "not all rows"),
        ([0], [0], [4], 3, "room for 3 elements"),
        ([0, 1], [0], [4], 9, "start_offset must have 2 elements"),
    ],
)
def test_what_does_not_fit_is_refused(rows, starts, ends, room, message):
    index = [torch.tensor(values) for values in (rows, starts, ends)]
    with pytest.raises(ValueError, match=message):
        assign_extend_cache_locs_cpu(index[0], table(), index[1], index[2], torch.zeros(room).long(), WIDTH)


def test_a_width_that_is_not_the_tables_is_refused():
    one = torch.tensor([0])
    with pytest.raises(ValueError, match="req_to_token must have 23 columns"):
        assign_req_to_token_pool_cpu(one, table(), one, one, one, WIDTH - 1)
