"""The interface of the kernels that read and write the packed cache, of which every device has an implementation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sglang.srt.kvtuner.attention.steps import StepPlan, StepPlanner
from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.config.flags import DEFAULT_WORKSPACE_TOKENS
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat


class KernelsUnavailable(RuntimeError):
    """An implementation cannot serve on this machine; the message says why."""


@dataclass(frozen=True)
class Workload:
    """What kernels hold memory for, beside request slots, on one rank.

    heads: query heads, the most of a layer. kv_heads, head_dim, page_size, dtype: of the cache, dtype in full precision.
    most_pages: of the longest request. workspace_tokens: tokens that a prefill dequantizes at once.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    most_pages: int
    workspace_tokens: int = DEFAULT_WORKSPACE_TOKENS

    @classmethod
    def over(
        cls, storage: CacheStorage, *, heads: int, most_pages: int, workspace_tokens: int = DEFAULT_WORKSPACE_TOKENS
    ) -> Workload:
        """The workload of kernels over ``storage``."""
        shape = (storage.kv_heads, storage.head_dim, storage.page_size)
        return cls(heads, *shape, storage.dtype, most_pages, workspace_tokens)


class Kernels(ABC):
    """Attention over one cache, and storing into it.

    name: for logs and reports; an instance may say more. planner_class: what makes the plans of its steps. graph_safe: a decode
    step, plan included, is nothing but launches over buffers that stay where they are, so that CUDA graphs can replay it.
    """

    name: str
    graph_safe: ClassVar[bool] = False
    planner_class: ClassVar[type[StepPlanner]] = StepPlanner

    def __init__(self, storage: CacheStorage, workload: Workload | None = None) -> None:
        """Kernels that hold memory need to know their ``workload``."""
        self.storage = storage

    @classmethod
    @abstractmethod
    def supports(cls, layer: LayerFormat) -> str | None:
        """Why a layer of this format cannot be served, or None where it can. The one place that says so."""

    @classmethod
    def prepare(cls) -> None:
        """Build or load what the implementation needs, once per process. Raises KernelsUnavailable where that cannot be."""

    @classmethod
    def identity(cls) -> str:
        """What all ranks of a server must have alike: the name, and the version of what compiles the kernels where nodes may have
        different ones. Their sources are compared with all other code."""
        return cls.name

    def compile(self, planner: StepPlanner, workload: Workload) -> None:
        """Compile, load and try all that steps with plans of ``planner`` will launch, so that neither the capture of a CUDA graph
        nor a request waits for a compiler. Leaves no trace in the cache. Raises KernelsUnavailable."""

    @classmethod
    def memory(cls, workload: Workload) -> tuple[KernelMemory, ...]:
        """The device memory that kernels and their planner hold, and an upper bound of what a step takes beside its inputs and
        its result."""
        return ()

    def plan(self, step: StepPlan) -> Any:
        """The step in the form that :meth:`attend` and :meth:`store` take; made once for all layers."""
        return step

    @abstractmethod
    def attend(
        self, layer: int, plan: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Causal grouped-query attention of the step's tokens over all that their requests have.

        layer: index among the cache's layers. q: [tokens, heads, head_dim]. k, v: [tokens, kv_heads, head_dim], the step's own.
        Returns [tokens, heads, head_dim] in q's dtype.
        """

    @abstractmethod
    def store(self, layer: int, plan: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        """Pack the pages that the step completes, keep its newest tokens in the rings.

        k, v: [tokens, kv_heads, head_dim]. Comes after :meth:`attend` of the same layer and step: a long chunk overwrites ring
        rows that its own queries read.
        """

    @staticmethod
    @abstractmethod
    def pack_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
        """Quantize and pack x [pages, page_size, head_dim]; uint8 [pages, block_bytes], the bytes that
        :func:`sglang.srt.kvtuner.format.page_codec.pack_pages` defines."""
