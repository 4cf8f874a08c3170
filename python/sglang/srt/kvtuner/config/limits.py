"""What pages ask of upstream's own settings: the page size, the chunk size, and how many tokens a pool must hold."""

from __future__ import annotations

from sglang.srt.kvtuner.config.flags import DEFAULT_PAGE_SIZE, KVTunerConfigError, shown

SMALLEST_PAGE = 8
LARGEST_PAGE = 1024
# Upstream's scheduler admits a request that needs a page for its prompt, one for its answer, one to spare, which
# it counts for every request, and one that HELD_BACK_PAGES takes.
LEAST_PAGES = 4
# What a request may generate at most leaves this many pages of the pool alone. Without them upstream never admits a
# request that ignores the end of the sequence and asks for all of the pool, where the radix cache is off: it counts a
# token more than there are, and after a retraction up to a page more.
HELD_BACK_PAGES = 1


def page_size_of(requested: object) -> int:
    """Tokens of a page for the value of --page-size, None for the default. Raises KVTunerConfigError."""
    if requested is None:
        return DEFAULT_PAGE_SIZE
    if type(requested) is int and SMALLEST_PAGE <= requested <= LARGEST_PAGE and not requested & (requested - 1):
        return requested
    raise KVTunerConfigError(
        f"--page-size is {shown(requested)}; with --enable-kvtuner-quant valid are powers of two from {SMALLEST_PAGE} to "
        f"{LARGEST_PAGE} ({DEFAULT_PAGE_SIZE} by default)"
    )


def require_chunks_of_pages(chunked_prefill_size: object, page_size: int) -> None:
    """Raise KVTunerConfigError for a chunk (--chunked-prefill-size) that ends inside a page."""
    if type(chunked_prefill_size) is int and (chunked_prefill_size <= 0 or chunked_prefill_size % page_size == 0):
        return
    raise KVTunerConfigError(
        f"--chunked-prefill-size is {shown(chunked_prefill_size)}; with --enable-kvtuner-quant valid are multiples of "
        f"the page (--page-size {page_size}), or -1 for no chunks"
    )


def least_tokens(page_size: int) -> int:
    """Tokens of the smallest pool that serves a request of up to a page of prompt and almost a page of answer."""
    return LEAST_PAGES * page_size


def require_enough_tokens(max_total_tokens: object, page_size: int) -> None:
    """Raise KVTunerConfigError for a --max-total-tokens whose pool could serve no request; None is no cap."""
    least = least_tokens(page_size)
    if max_total_tokens is None or (type(max_total_tokens) is int and max_total_tokens >= least):
        return
    raise KVTunerConfigError(
        f"--max-total-tokens is {shown(max_total_tokens)}; with --enable-kvtuner-quant valid are {least} and above, "
        f"{LEAST_PAGES} pages (--page-size {page_size})"
    )


def longest_input(pool_tokens: int, page_size: int) -> int:
    """Prompts of this length or longer are refused: upstream's scheduler, which wants a page more than the prompt, would
    keep them waiting for ever."""
    return pool_tokens - page_size - 1
