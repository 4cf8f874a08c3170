"""What verification of draft tokens accepted, gathered into compact lists."""

from sgl_kernel._checks import check_cpu, check_index, check_room


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    """Pack the cache slots of the accepted tokens at the front of a list.

    Args:
        accept_index: int of any shape, indices into ``out_cache_loc`` in row-major order; a negative one is an empty
            place and is skipped.
        out_cache_loc: [tokens] int, the slot of every verified token.
        accept_out_cache_loc: int, at least as many elements as there are accepted tokens, written in place; what it
            holds beyond them stays as it was.

    Raises:
        ValueError: the output is too short or not contiguous, or an index is out of range.
    """
    check_cpu("accept_index", accept_index)
    index = check_index("accept_index", accept_index.reshape(-1))
    index = index[index >= 0]
    if index.numel() and int(index.max()) >= out_cache_loc.numel():
        raise ValueError(f"accept_index {int(index.max())} is beyond the {out_cache_loc.numel()} verified tokens")
    packed = check_room("accept_out_cache_loc", accept_out_cache_loc, index.numel())
    packed[: index.numel()] = out_cache_loc[index].to(packed.dtype)


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    """Take each request's last accepted token: the one that the target model added itself.

    Args:
        accept_tokens: int, ``accept_stride`` tokens per request, one request after the other.
        accept_lens: [batch] int, how many of them are accepted, the added one included: 1 to ``accept_stride``.
        bonus_tokens: [batch] int, written in place.
        accept_stride: tokens per request.

    Raises:
        ValueError: shapes do not fit or a length is out of range.
    """
    check_cpu("accept_tokens", accept_tokens)
    lengths = check_index("accept_lens", accept_lens)
    batch = lengths.numel()
    bonus = check_room("bonus_tokens", bonus_tokens, batch)
    if accept_tokens.numel() < batch * accept_stride:
        raise ValueError(f"accept_tokens has {accept_tokens.numel()} elements, not {batch} times {accept_stride}")
    if batch and not 1 <= int(lengths.min()) <= int(lengths.max()) <= accept_stride:
        raise ValueError(f"accept_lens {lengths.tolist()} are not all from 1 to {accept_stride}")
    rows = accept_tokens.reshape(-1)[: batch * accept_stride].view(batch, accept_stride)
    bonus[:batch] = rows.gather(1, lengths.unsqueeze(1) - 1).squeeze(1).to(bonus.dtype)
