"""Moving cache slots between the table of running requests and flat lists.

``req_to_token[r, p]`` is the cache slot of position ``p`` of the request in row ``r``. A batch names rows
(``req_pool_indices``) and, for each, a half-open range of positions; the flat list holds the slots of all ranges one
after the other, in the order of the batch.
"""

import torch

from sgl_kernel._checks import check_index, check_matrix, check_room


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write a flat list of cache slots into the requests' rows.

    Args:
        req_pool_indices: [batch] int, the row of each request.
        req_to_token: [rows, pool_len] int, written in place.
        start_offset, end_offset: [batch] int, the positions [start, end) of each request.
        out_cache_loc: int, at least sum(end - start) slots, one request after the other.
        pool_len: the width of ``req_to_token``.

    Raises:
        ValueError: shapes or dtypes do not fit, a range is reversed or leaves the row, or the list is too short.
    """
    rows, positions = _cells(req_pool_indices, req_to_token, start_offset, end_offset, pool_len)
    slots = check_room("out_cache_loc", out_cache_loc, positions.numel())[: positions.numel()]
    req_to_token[rows, positions] = slots.to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Read the cache slots of each request's positions [start, end) into a flat list.

    The arguments are those of :func:`assign_req_to_token_pool_cpu`, with ``out_cache_loc`` written in place; what it
    holds beyond sum(end - start) elements stays as it was.

    Raises:
        ValueError: as there.
    """
    rows, positions = _cells(req_pool_indices, req_to_token, start_offset, end_offset, pool_len)
    slots = check_room("out_cache_loc", out_cache_loc, positions.numel())
    slots[: positions.numel()] = req_to_token[rows, positions].to(slots.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, speculative_num_steps
):
    """Read the ``topk * speculative_num_steps`` cache slots that follow each request's committed tokens.

    Args:
        req_pool_indices: [batch] int, the row of each request.
        req_to_token: [rows, pool_len] int.
        seq_lens: [batch] int, the number of committed tokens: the first position that is read.
        out_cache_loc: [batch * topk * speculative_num_steps] int, written in place.
        pool_len: the width of ``req_to_token``.
        topk, speculative_num_steps: branches of the draft tree and steps of each.

    Raises:
        ValueError: shapes or dtypes do not fit, or a range leaves its row.
    """
    starts = check_index("seq_lens", seq_lens)
    ends = starts + topk * speculative_num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, starts, ends, out_cache_loc, pool_len)


def _cells(req_pool_indices, req_to_token, start_offset, end_offset, pool_len):
    """Rows and positions of every cell of the batch's ranges, in order."""
    check_matrix("req_to_token", req_to_token, columns=pool_len)
    rows = check_index("req_pool_indices", req_pool_indices)
    starts = check_index("start_offset", start_offset, rows.numel())
    ends = check_index("end_offset", end_offset, rows.numel())
    lengths = ends - starts
    if rows.numel() and (int(lengths.min()) < 0 or int(starts.min()) < 0 or int(ends.max()) > pool_len):
        raise ValueError(f"ranges [{starts.tolist()}, {ends.tolist()}) are not all ranges of a row of {pool_len}")
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= req_to_token.shape[0]):
        raise ValueError(f"req_pool_indices {rows.tolist()} are not all rows of a table of {req_to_token.shape[0]}")
    first_cell = torch.cumsum(lengths, 0) - lengths
    positions = torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - first_cell, lengths)
    return torch.repeat_interleave(rows, lengths), positions
