"""The C++ kernels for CPUs behind the interface of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.kernels.ops.attention.kvtuner import cpu as ops
from sglang.srt.kvtuner.attention.base import Kernels, KernelsUnavailable
from sglang.srt.kvtuner.attention.steps import StepPlan
from sglang.srt.kvtuner.cache.storage import CacheStorage, LayerStorage
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.layout import VectorLayout


@dataclass(frozen=True)
class CpuStep:
    """A step as the C++ code takes it: ``sequences`` int64 [requests, 6], ``pages`` int32."""

    sequences: torch.Tensor
    pages: torch.Tensor


class CpuKernels(Kernels):
    """Attention and storing on the CPU, for formats whose codes lie in vectors. Raises KernelsUnavailable when the kernels
    cannot be built."""

    def __init__(self, storage: CacheStorage) -> None:
        super().__init__(storage)
        try:
            self._module = ops.module()
        except ops.KernelBuildError as e:
            raise KernelsUnavailable(str(e)) from e
        self.name = f"C++ ({self._module.body_name()})"
        self._layers = [self._arguments(layer) for layer in storage.layers]

    @classmethod
    def supports(cls, layer: LayerFormat) -> str | None:
        return _unsupported(layer.key) or _unsupported(layer.value)

    def plan(self, step: StepPlan) -> CpuStep:
        first = torch.arange(step.slots.numel()) * step.pages.shape[1]
        query_lens = step.query_start.diff()
        columns = (step.slots, step.query_start[:-1], query_lens, step.prefix_lens, step.packed_end, first)
        return CpuStep(torch.stack([column.long() for column in columns], dim=1), step.pages)

    def attend(
        self, layer: int, plan: CpuStep, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        self._module.attend(q, *self._cache(layer, plan, k, v), scaling, out)
        return out

    def store(self, layer: int, plan: CpuStep, k: torch.Tensor, v: torch.Tensor) -> None:
        self._module.store(*self._cache(layer, plan, k, v))

    @staticmethod
    def pack_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
        blocks = torch.empty(x.shape[0], fmt.block_bytes, dtype=torch.uint8)
        ops.module().pack_pages(
            x.contiguous(),
            blocks,
            fmt.nbits,
            int(fmt.asym),
            fmt.axis,
            fmt.group_size,
            int(fmt.token_lanes),
            fmt.hadamard,
        )
        return blocks

    def read_pages(self, layer: int, plan: CpuStep) -> int:
        """The sum of all 64-bit words (and further bytes) in the packed pages that the step reads, head by head in the order of
        :meth:`attend`: the time that attention cannot go below, for benchmarks."""
        half = self.storage.layers[layer]
        return self._module.read_pages(
            half.key.pages, half.value.pages, plan.sequences, plan.pages, self.storage.page_size
        )

    def _cache(self, layer: int, plan: CpuStep, k: torch.Tensor, v: torch.Tensor) -> tuple:
        buffers, formats = self._layers[layer]
        dtype, page_size = self.storage.dtype, self.storage.page_size
        return k.to(dtype), v.to(dtype), *buffers, plan.sequences, plan.pages, formats, page_size

    @staticmethod
    def _arguments(layer: LayerStorage) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        k, v = layer.key, layer.value
        formats = [[f.nbits, int(f.asym), f.axis, f.group_size, f.hadamard] for f in (k.format, v.format)]
        return (k.ring, v.ring, k.pages, v.pages, k.sinks, v.sinks), torch.tensor(formats, dtype=torch.int64)


def _unsupported(fmt: TensorFormat) -> str | None:
    reduction = fmt.head_dim if fmt.token_lanes else fmt.page_size
    if not isinstance(fmt.layout, VectorLayout) or reduction % 16:
        return f"pages of {fmt.page_size} tokens and heads of {fmt.head_dim} do not both divide by 16"
    group_along_reduction = (fmt.axis == 0) == fmt.token_lanes
    if fmt.group_size % (32 // fmt.nbits if group_along_reduction else 16):
        return f"groups of {fmt.group_size} at {fmt.nbits} bits do not fill vectors"
    return None
