"""How the checks make the product's objects: the one place that knows constructors and settings."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sglang.srt.kvtuner.attention import triton as triton_kernels
from sglang.srt.kvtuner.attention.base import Kernels, Workload
from sglang.srt.kvtuner.attention.prefill_libraries import LIBRARIES, VARIABLE
from sglang.srt.kvtuner.attention.steps import StepPlan, StepPlanner
from sglang.srt.kvtuner.cache.storage import CacheStorage, LayerStorage, TensorStorage
from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat


def make_kernels(storage: CacheStorage, *, heads: int, most_pages: int, workspace_tokens: int | None = None) -> Kernels:
    """The kernels under test. heads: query heads of a rank. most_pages: of the longest request. workspace_tokens: tokens that an
    extend dequantizes at once; None is the product's default."""
    tokens = {} if workspace_tokens is None else {"workspace_tokens": workspace_tokens}
    return triton_kernels.TritonKernels(storage, Workload.over(storage, heads=heads, most_pages=most_pages, **tokens))


def make_planner(
    kernels: Kernels, req_to_token: torch.Tensor, req_generation: torch.Tensor, max_rows: int
) -> StepPlanner:
    """The planner that belongs to the kernels, with room for decode steps of ``max_rows`` requests."""
    planner = kernels.planner_class(
        page_size=kernels.storage.page_size,
        residual_length=kernels.storage.residual_length,
        req_to_token=req_to_token,
        req_generation=req_generation,
    )
    planner.allocate(max_rows)
    return planner


def unsupported(layer: LayerFormat) -> str | None:
    """Why the kernels under test do not serve a layer of this format; None where they do."""
    return triton_kernels.TritonKernels.supports(layer)


def pack_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """The kernels' packing of x [pages, page_size, head_dim]."""
    return triton_kernels.TritonKernels.pack_pages(x, fmt)


@contextlib.contextmanager
def decode_splits(count: int | None) -> Iterator[None]:
    """Decode steps read packed pages in ``count`` parts, whatever the device; None leaves the choice to the kernels."""
    chosen = triton_kernels.decode_splits
    if count is not None:
        triton_kernels.decode_splits = lambda *_: count
    try:
        yield
    finally:
        triton_kernels.decode_splits = chosen


def chosen_splits(programs: int, device: torch.device) -> int:
    """The kernels' own choice."""
    return triton_kernels.decode_splits(programs, device)


def make_storage(
    layers: Sequence[LayerFormat], *, num_pages: int, num_slots: int, residual: int, kv_heads: int, dtype: torch.dtype,
    device: torch.device, allocate: Any = torch.zeros,
) -> CacheStorage:  # fmt: skip
    """Buffers of a cache. allocate: called as torch.zeros for each of them."""
    first = layers[0].key
    page, ring = first.page_size, (-(-residual // first.page_size) + 1) * first.page_size

    def half(fmt: TensorFormat, sinks: int) -> TensorStorage:
        row = (kv_heads, fmt.head_dim)
        return TensorStorage(
            fmt,
            allocate((num_pages, kv_heads, fmt.block_bytes), dtype=torch.uint8, device=device),
            allocate((num_slots, ring, *row), dtype=dtype, device=device),
            allocate((num_pages, sinks, *row), dtype=dtype, device=device),
        )

    return CacheStorage(
        layers=tuple(LayerStorage(half(f.key, f.sink_length), half(f.value, f.sink_length)) for f in layers),
        page_size=page,
        ring_length=ring,
        residual_length=residual,
        kv_heads=kv_heads,
        head_dim=first.head_dim,
        dtype=dtype,
        device=device,
        nonfinite_blocks=torch.zeros(1, dtype=torch.int64, device=device),
    )


def make_plan(
    device: torch.device, *, slots: list[int], prefix_lens: list[int], packed_end: list[int], counts: list[int],
    pages: list[list[int]],
) -> StepPlan:  # fmt: skip
    """A plan from what the host knows, without a planner: what the reference reads."""
    most = max(map(len, pages))
    rows = [[*row, *[0] * (most - len(row))] for row in pages]
    return StepPlan(
        slots=torch.tensor(slots, dtype=torch.int64, device=device),
        query_start=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device),
        prefix_lens=torch.tensor(prefix_lens, dtype=torch.int32, device=device),
        packed_end=torch.tensor(packed_end, dtype=torch.int32, device=device),
        pages=torch.tensor(rows, dtype=torch.int32, device=device).view(len(rows), most),
        most_queries=max(counts),
        host_prefix_lens=tuple(prefix_lens),
    )


def prefill_variants(
    storage: CacheStorage, *, heads: int, most_pages: int, one_pass: int, in_rounds: int
) -> dict[str, Kernels | str]:
    """Ways in which extends over a cache are computed, by name, or why one cannot be made here; ``attend`` of one whose library
    does not import raises ImportError.

    one_pass, in_rounds: tokens of a workspace that holds prefixes and chunks, and of one that does not hold the prefixes.
    """
    wanted = {"Triton, one pass": ("triton", one_pass), "Triton, rounds": ("triton", in_rounds)}
    wanted |= {library: (library, one_pass) for library in LIBRARIES}
    return {name: _prefill_kernels(storage, heads, most_pages, *how) for name, how in wanted.items()}


def _prefill_kernels(storage: CacheStorage, heads: int, most_pages: int, library: str, tokens: int) -> Kernels | str:
    earlier = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = library
    try:
        return make_kernels(storage, heads=heads, most_pages=most_pages, workspace_tokens=tokens)
    except KVTunerConfigError as e:
        return str(e)
    finally:
        os.environ.pop(VARIABLE)
        if earlier is not None:
            os.environ[VARIABLE] = earlier
