"""Keys and values of earlier tokens, read back from the cache in parts of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.srt.kvtuner.attention.steps import RequestStep
from sglang.srt.kvtuner.cache.storage import CacheStorage, TensorStorage
from sglang.srt.kvtuner.format.page_codec import unpack_pages


def prefix_parts(
    storage: CacheStorage, layer: int, request: RequestStep, page_ids: torch.Tensor, most_tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """K and V of a request's tokens before the step, float32 [tokens, kv_heads, head_dim] each, in the order of positions and
    at most ``most_tokens`` (at least a page) at a time.

    page_ids: the request's row of the plan's ``pages``.
    """
    page = storage.page_size
    whole = max(most_tokens // page, 1)
    halves = (storage.layers[layer].key, storage.layers[layer].value)
    packed = request.packed_end // page
    for first in range(0, packed, whole):
        ids = page_ids[first : min(first + whole, packed)]
        yield tuple(_read_pages(half, ids, first == 0) for half in halves)
    for start in range(request.packed_end, request.prefix_len, whole * page):
        end = min(start + whole * page, request.prefix_len)
        rows = torch.arange(start, end, device=storage.device) % storage.ring_length
        yield tuple(half.ring[request.slot].index_select(0, rows).float() for half in halves)


def _read_pages(half: TensorStorage, page_ids: torch.Tensor, from_start: bool) -> torch.Tensor:
    values = unpack_pages(half.pages.index_select(0, page_ids), half.format)  # [pages, kv_heads, page_size, head_dim]
    values = values.transpose(1, 2).flatten(0, 1)
    if from_start:
        # A slice of one page id, not the id itself: a number would have to come to the host.
        values[: half.sinks.shape[1]] = half.sinks.index_select(0, page_ids[:1])[0].float()
    return values
