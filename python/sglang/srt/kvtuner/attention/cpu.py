"""The C++ kernels for CPUs behind the interface of kernels."""

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass
from typing import Any

import torch

from sglang.kernels.ops.attention.kvtuner import cpu as ops
from sglang.srt.kvtuner.attention.base import Kernels, KernelsUnavailable, Workload
from sglang.srt.kvtuner.attention.steps import ON_HOST, StepPlan
from sglang.srt.kvtuner.cache.storage import CacheStorage, LayerStorage, TensorStorage
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.layout import VectorLayout

# What the C++ code takes by the names of its fields (csrc/kvtuner/cpu/fields.h).
_SHARED_CLASSES: tuple[type, ...] = (TensorFormat, TensorStorage, LayerStorage, StepPlan)


class CpuKernels(Kernels):
    """Attention and storing on the CPU, for formats whose codes lie in vectors.

    Layers and steps are objects of C++: checked once, when they are made. Raises RuntimeError where C++ has other fields than
    the classes here.
    """

    name = "C++"

    def __init__(self, storage: CacheStorage, workload: Workload | None = None) -> None:
        super().__init__(storage, workload)
        self._module = ops.module()
        check_fields(self._module.field_names())
        self.name = f"C++ ({self._module.body_name()})"
        self._layers = [self._module.layer(_by_name(layer), storage.nonfinite_blocks) for layer in storage.layers]
        # Looked up once: a step asks for each of them once per layer.
        self._attend, self._store = self._module.attend, self._module.store

    @classmethod
    def supports(cls, layer: LayerFormat) -> str | None:
        return _unsupported(layer.key) or _unsupported(layer.value)

    @classmethod
    def prepare(cls) -> None:
        try:
            ops.module()
        except ops.KernelBuildError as e:
            raise KernelsUnavailable(str(e)) from e

    def plan(self, step: StepPlan) -> Any:
        return self._module.step(self._layers[0], _by_name(step))

    def attend(
        self, layer: int, plan: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        self._attend(self._layers[layer], plan, q, self._stored(k), self._stored(v), scaling, out)
        return out

    def store(self, layer: int, plan: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self._store(self._layers[layer], plan, self._stored(k), self._stored(v))

    @staticmethod
    def pack_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
        blocks = torch.empty(x.shape[0], fmt.block_bytes, dtype=torch.uint8)
        ops.module().pack_pages(x.contiguous(), blocks, _by_name(fmt))
        return blocks

    def _stored(self, rows: torch.Tensor) -> torch.Tensor:
        dtype = self.storage.dtype
        return rows if rows.dtype == dtype else rows.to(dtype)

    def read_pages(self, layer: int, plan: Any) -> int:
        """The sum of all 64-bit words (and further bytes) in the packed pages that the step reads, head by head in the order of
        :meth:`attend`: the time that attention cannot go below, for benchmarks."""
        return self._module.read_pages(self._layers[layer], plan)


def code_places(fmt: TensorFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where C++ puts each (token, channel) of a page: first byte and lowest bit of its code, and the place of its scale among
    the block's scales. int64 [page_size, head_dim] each; for tests against the definition (format/layout.py)."""
    codes = torch.empty(fmt.page_size, fmt.head_dim, 2, dtype=torch.int64)
    parameters = torch.empty(fmt.page_size, fmt.head_dim, dtype=torch.int64)
    ops.module().code_places(_by_name(fmt), codes, parameters)
    return codes[..., 0], codes[..., 1], parameters


def check_fields(names: Any) -> None:
    """Compare the lists of fields that C++ names, by class, with the fields of the classes here. Raises RuntimeError."""
    for shared in _SHARED_CLASSES:
        here, there = [field.name for field in _fields(shared)], list(names.get(shared.__name__, ()))
        if here != there:
            raise RuntimeError(f"{shared.__name__} has the fields {here}, but {there} in the C++ kernels")


def _fields(shared: Any) -> list[Field[Any]]:
    return [field for field in fields(shared) if field.metadata != ON_HOST]


def _by_name(x: Any) -> dict[str, Any]:
    """Fields of a dataclass that kernels get, nested ones too, by name; tensors as they are."""
    values = {field.name: getattr(x, field.name) for field in _fields(x)}
    return {name: _by_name(value) if is_dataclass(value) else value for name, value in values.items()}


def _unsupported(fmt: TensorFormat) -> str | None:
    reduction = fmt.head_dim if fmt.token_lanes else fmt.page_size
    if not isinstance(fmt.layout, VectorLayout) or reduction % 16:
        return f"pages of {fmt.page_size} tokens and heads of {fmt.head_dim} do not both divide by 16"
    group_along_reduction = (fmt.axis == 0) == fmt.token_lanes
    if fmt.group_size % (32 // fmt.nbits if group_along_reduction else 16):
        return f"groups of {fmt.group_size} at {fmt.nbits} bits do not fill vectors"
    return None
