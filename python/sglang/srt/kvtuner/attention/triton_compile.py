"""Every kind of launch that serving will make, tried once before it begins: what Triton has to compile, it compiles then.

The trials are steps like any other, so that what they launch is what serving launches, down to the specializations that Triton
makes for arguments that are 1 or divide by 16. They are steps of the padding request: slot 0 and page 0, with keys and values of
zero, which is what is there.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from sglang.srt.kvtuner.attention.base import Kernels, KernelsUnavailable
from sglang.srt.kvtuner.attention.steps import StepPlan, StepPlanner

logger = logging.getLogger(__name__)

# The log says at most as often how far it is.
PROGRESS_SECONDS = 5.0
# Tokens of a request in a trial of an extend: more than one, and less than a page, so that none is packed.
_EXTEND_TOKENS = 2


def try_kernels(kernels: Kernels, planner: StepPlanner, heads: int, workspace_tokens: int) -> None:
    """Attend and store in trial steps, in one layer of each format.

    planner: makes the plans of decode steps, of as many requests as it has slots. heads: query heads. workspace_tokens: prefixes
    that are longer together come in rounds. Raises KernelsUnavailable with what Triton, its compiler or the driver says.
    """
    layers: dict[tuple[Any, ...], int] = {}
    for i, layer in enumerate(kernels.storage.layers):
        layers.setdefault((layer.key.format, layer.value.format, layer.key.sinks.shape[1]), i)
    trials = [(*step, index) for index in layers.values() for step in _steps(planner, workspace_tokens)]
    logger.info(
        "Compiling the Triton kernels of the quantized KV cache: %d trial steps in %d layers of different formats (what an "
        "earlier start has compiled comes from Triton's cache)", len(trials), len(layers),
    )  # fmt: skip
    start = reported = time.perf_counter()
    for done, (name, make_plan, index) in enumerate(trials):
        try:
            _try(kernels, make_plan(), index, heads)
        except Exception as error:
            raise KernelsUnavailable(
                f"the Triton kernels for {name} in layer {index} cannot be compiled or launched: {error}"
            ) from error
        now = time.perf_counter()
        if now - reported >= PROGRESS_SECONDS:
            reported = now
            logger.info(
                "Compiling the Triton kernels of the quantized KV cache: %d of %d trial steps, %.1f s",
                done + 1, len(trials), now - start,
            )  # fmt: skip
    logger.info("Triton kernels of the quantized KV cache are ready (%.1f s)", time.perf_counter() - start)


def _try(kernels: Kernels, plan: StepPlan, layer: int, heads: int) -> None:
    storage = kernels.storage
    requests = plan.slots.shape[0]
    # Queries of a model come as rows of a wider matrix: like these, at addresses and strides that divide by 16.
    q, k, v = (
        torch.zeros(requests * plan.most_queries, n, storage.head_dim, dtype=storage.dtype, device=storage.device)
        for n in (heads, storage.kv_heads, storage.kv_heads)
    )
    made = kernels.plan(plan)
    kernels.attend(layer, made, q, k, v, storage.head_dim**-0.5)
    kernels.store(layer, made, k, v)
    if storage.device.type == "cuda":
        torch.cuda.synchronize(storage.device)  # where a launch that failed says so


def _steps(planner: StepPlanner, workspace_tokens: int) -> Iterator[tuple[str, Callable[[], StepPlan]]]:
    """Names and plans of the trial steps: one of each kind."""
    device, slots = planner.req_to_token.device, planner.req_to_token.shape[0]
    for rows in _decode_rows(slots):
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        yield f"a decode step (requests: {rows})", partial(planner.plan_decode, zeros, zeros + 1, 1)
    # A planner of its own, so that nobody's slot changes hands, over the row of the padding request.
    padding = type(planner)(
        page_size=planner.page_size,
        residual_length=planner.residual_length,
        req_to_token=planner.req_to_token[:1],
        req_generation=torch.zeros(1, dtype=torch.int64),
    )
    longest = (planner.req_to_token.shape[1] - _EXTEND_TOKENS) // planner.page_size * planner.page_size
    for name, prefix_lens in _prefixes(planner.page_size, longest, workspace_tokens, slots):
        requests = len(prefix_lens)
        yield (
            f"{name} (requests: {requests})",
            partial(padding.plan, [0] * requests, prefix_lens, [_EXTEND_TOKENS] * requests),
        )


def _decode_rows(most: int) -> list[int]:
    """Numbers of requests that need, between them, every number of splits that 1 to ``most`` need: twice the requests have half of
    the splits, or one."""
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def _extend_requests(least: int, most: int) -> list[int]:
    """Of ``least`` to ``most`` requests one number of each kind: upstream's kernel takes the number as an argument, and Triton
    compiles it apart for 1 and for what divides by 16."""
    kinds: dict[tuple[bool, bool], int] = {}
    for requests in range(least, most + 1):
        kinds.setdefault((requests == 1, requests % 16 == 0), requests)
    return list(kinds.values())


def _prefixes(page_size: int, longest: int, workspace_tokens: int, slots: int) -> Iterator[tuple[str, list[int]]]:
    """Names and prefixes of extends: without a prefix, with one, with more than the workspace holds."""
    for requests in _extend_requests(1, slots):
        yield "an extend without a prefix", [0] * requests
        if longest > 0:
            yield "an extend with a prefix", [page_size] + [0] * (requests - 1)
    if longest > 0:
        prefix = min(longest, (workspace_tokens // page_size + 1) * page_size)
        for requests in _extend_requests(workspace_tokens // prefix + 1, slots):
            yield "an extend in rounds", [prefix] * requests
