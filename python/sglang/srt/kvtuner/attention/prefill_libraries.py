"""Libraries that attend in prefills in place of upstream's Triton kernel, on the GPUs that they are made for.

They get keys and values of a request end to end, its prefix and then the step's own, and attend in one launch; so there is no
log-sum-exp to merge, which FlashInfer has to base 2 and the others to base e. A step whose keys the workspace does not hold stays
with upstream's kernel.

**Not yet measured on a GPU.** SGLANG_KVTUNER_PREFILL asks for one by name; ``auto`` is upstream's Triton kernel.
"""

from __future__ import annotations

import importlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from sglang.srt.kvtuner.attention.base import Workload
from sglang.srt.kvtuner.attention.steps import StepPlan
from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory
from sglang.srt.kvtuner.config.compatibility import kind_of
from sglang.srt.kvtuner.config.flags import KVTunerConfigError, shown

VARIABLE = "SGLANG_KVTUNER_PREFILL"

# What FlashInfer recommends for its partial results; it allocates the second for plans itself.
_FLASHINFER_BYTES, _FLASHINFER_PLAN_BYTES = 128 << 20, 8 << 20


@dataclass(frozen=True)
class KeyRows:
    """Where the keys of a step lie when each request's prefix is followed by its own rows, and the next request's come behind.

    query_start, start: int32 [requests + 1] on the device, where queries and keys of each request begin; host_query_start and
    host_start on the host. own: int64 [queries], where the step's own rows go; None without prefixes, where they are all.
    """

    query_start: torch.Tensor
    start: torch.Tensor
    host_query_start: tuple[int, ...]
    host_start: tuple[int, ...]
    own: torch.Tensor | None

    @classmethod
    def of(
        cls, step: StepPlan, prefix_start: torch.Tensor, host_prefix_start: tuple[int, ...], host_query_start: tuple[int, ...]
    ) -> KeyRows:  # fmt: skip
        """From where prefixes and queries begin when all of them lie end to end; asks the device for nothing."""
        query_start, queries = step.query_start, host_query_start[-1]
        if not host_prefix_start[-1]:
            return cls(query_start, query_start, host_query_start, host_query_start, None)
        # A row of the batch comes behind all prefixes up to its own request's.
        before = torch.repeat_interleave(prefix_start[1:], query_start.diff(), output_size=queries)
        own = before + torch.arange(queries, device=before.device)
        host_start = tuple(map(sum, zip(host_prefix_start, host_query_start, strict=True)))
        return cls(query_start, prefix_start + query_start, host_query_start, host_start, own)

    @cached_property
    def most_queries(self) -> int:
        """Of a request."""
        return most(self.host_query_start)

    @cached_property
    def most_keys(self) -> int:
        """Of a request."""
        return most(self.host_start)


def most(starts: Sequence[int]) -> int:
    """The largest distance from one start to the next."""
    return max(end - start for start, end in itertools.pairwise(starts))


class PrefillLibrary(ABC):
    """Attention of prefills by a library.

    needs: a module that must import. capabilities: of the GPUs that it is meant for. head_dims: that it takes, any where empty.
    """

    needs: ClassVar[str]
    capabilities: ClassVar[tuple[tuple[int, int], ...]]
    head_dims: ClassVar[tuple[int, ...]] = ()

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self._workload, self._device = workload, device

    @classmethod
    @abstractmethod
    def memory(cls, workload: Workload) -> tuple[KernelMemory, ...]:
        """As of Kernels."""

    @abstractmethod
    def attend(
        self, rows: KeyRows, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None:  # fmt: skip
        """Write causal attention to ``out``; a request's queries are the last of its tokens.

        q, out: [queries, heads, head_dim], contiguous. keys, values: [tokens, kv_heads, head_dim], of which rows.start says whose
        they are.
        """


class FlashInferPrefill(PrefillLibrary):
    """FlashInfer's prefill over ragged keys (MLSys 2025), planned once per step for all layers."""

    needs = "flashinfer"
    capabilities = ((8, 0), (8, 6), (8, 9))
    head_dims = (64, 128, 256)

    def __init__(self, workload: Workload, device: torch.device) -> None:
        super().__init__(workload, device)
        room = torch.empty(_FLASHINFER_BYTES, dtype=torch.uint8, device=device)
        wrapper = importlib.import_module(self.needs).BatchPrefillWithRaggedKVCacheWrapper
        self._wrapper: Any = wrapper(room, "NHD", backend="fa2")
        self._planned: tuple[KeyRows, float] | None = None

    @classmethod
    def memory(cls, workload: Workload) -> tuple[KernelMemory, ...]:
        return (KernelMemory("FlashInfer's workspaces", _FLASHINFER_BYTES + _FLASHINFER_PLAN_BYTES),)

    def attend(
        self, rows: KeyRows, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None:  # fmt: skip
        if self._planned is None or self._planned[0] is not rows or self._planned[1] != scaling:
            # From the host's numbers: it would fetch them from the device.
            starts = (torch.tensor(start, dtype=torch.int32) for start in (rows.host_query_start, rows.host_start))
            workload = self._workload
            self._wrapper.plan(
                *starts, workload.heads, workload.kv_heads, workload.head_dim, causal=True, sm_scale=scaling,
                q_data_type=q.dtype, kv_data_type=keys.dtype,
            )  # fmt: skip
            self._planned = (rows, scaling)
        tokens = rows.host_start[-1]
        self._wrapper.run(q, keys[:tokens], values[:tokens], out=out)


class FlashAttention3Prefill(PrefillLibrary):
    """FlashAttention-3 (NeurIPS 2024) as upstream calls it."""

    needs = "sgl_kernel.flash_attn"
    capabilities = ((9, 0),)

    @classmethod
    def memory(cls, workload: Workload) -> tuple[KernelMemory, ...]:
        # It returns the result's log-sum-exp in float32, whether one wants it or not.
        return (KernelMemory("FlashAttention's sums", 4 * workload.workspace_tokens * workload.heads),)

    def attend(
        self, rows: KeyRows, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, out: torch.Tensor
    ) -> None:  # fmt: skip
        from sglang.kernels.ops.attention.flash_attention_v3 import flash_attn_varlen_func

        result = flash_attn_varlen_func(
            q=q, k=keys, v=values, cu_seqlens_q=rows.query_start, cu_seqlens_k=rows.start,
            max_seqlen_q=rows.most_queries, max_seqlen_k=rows.most_keys, softmax_scale=scaling, causal=True, out=out,
        )  # fmt: skip
        if result.data_ptr() != out.data_ptr():  # builds without ``out``
            out.copy_(result)


# What the variable calls upstream's Triton kernel, and the libraries.
_TRITON = ("auto", "triton")
LIBRARIES: dict[str, type[PrefillLibrary]] = {"flashinfer": FlashInferPrefill, "fa3": FlashAttention3Prefill}


def valid_prefills(device: str) -> tuple[str, ...]:
    """What the variable may say on ``device``."""
    return (*_TRITON, *(LIBRARIES if kind_of(device) == "cuda" else ()))


def requested_prefill(device: str) -> str:
    """What the variable says. Raises KVTunerConfigError for what the device does not have."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in valid_prefills(device):
        raise KVTunerConfigError(f"{VARIABLE} is {shown(wanted)}; valid are {', '.join(valid_prefills(device))}")
    return wanted


def choose_library(workload: Workload) -> type[PrefillLibrary] | None:
    """The library that SGLANG_KVTUNER_PREFILL asks for, None for upstream's Triton kernel (``auto``, ``triton``).

    Raises KVTunerConfigError for other values, and for a library that does not serve this GPU or model or does not import.
    """
    wanted = requested_prefill("cuda")
    if wanted in _TRITON:
        return None
    library = LIBRARIES[wanted]
    capability = _capability()
    head_dim = workload.head_dim
    if capability not in library.capabilities:
        found = "there is no GPU" if capability is None else f"this one has {'.'.join(map(str, capability))}"
        made_for = ", ".join(".".join(map(str, made_for)) for made_for in library.capabilities)
        reason = f"it is for GPUs of compute capability {made_for}, and {found}"
    elif workload.dtype not in (torch.float16, torch.bfloat16):
        reason = f"it takes float16 and bfloat16, and the model is in {str(workload.dtype).removeprefix('torch.')}"
    elif library.head_dims and head_dim not in library.head_dims:
        reason = f"it takes heads of {', '.join(map(str, library.head_dims))}, and the model has {head_dim}"
    else:
        try:
            importlib.import_module(library.needs)
            return library
        except ImportError as e:
            reason = f"{library.needs} does not import ({e})"
    raise KVTunerConfigError(f"{VARIABLE} is {wanted!r}, but {reason}; valid are auto, triton")


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None
