"""The Triton kernels behind the interface of kernels: GPUs, and CPUs in Triton's interpreter for tests."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from sglang.kernels.ops.attention.kvtuner import triton_launch as launch
from sglang.kernels.ops.attention.kvtuner.triton_attend import attend_decode_kernel
from sglang.kernels.ops.attention.kvtuner.triton_merge import merge_splits_kernel
from sglang.kernels.ops.attention.kvtuner.triton_pack import pack_pages_kernel
from sglang.kernels.ops.attention.kvtuner.triton_store import store_pages_kernel, store_rows_kernel
from sglang.srt.kvtuner.attention.base import Kernels, KernelsUnavailable, Workload
from sglang.srt.kvtuner.attention.steps import StepPlan, StepPlanner
from sglang.srt.kvtuner.attention.triton_compile import try_kernels
from sglang.srt.kvtuner.attention.triton_extend import ExtendPlan, Workspace
from sglang.srt.kvtuner.attention.triton_planner import TritonPlanner
from sglang.srt.kvtuner.cache.kernel_memory import KernelMemory
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.layout import VectorLayout

MOST_HEAD_DIM = 256
# Of a page of one head, which a program packs as a whole.
MOST_ELEMENTS = 16_384
MOST_SPLITS = 32
# Programs among which splits share a decode step's pages, on any device: partial results are as many on all ranks.
MOST_PROGRAMS = 512
_DOTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1 when triton was imported)."""
    return triton.knobs.runtime.interpret


class TritonKernels(Kernels):
    """Attention and storing by Triton, for formats whose codes lie in vectors.

    All that it needs is allocated here, for decode steps of as many requests as the cache has slots: a CUDA graph keeps addresses.
    """

    name = "Triton"
    planner_class = TritonPlanner
    graph_safe = True

    def __init__(self, storage: CacheStorage, workload: Workload) -> None:
        super().__init__(storage, workload)
        self._dtype = _product_dtype(storage.dtype)
        self._tokens = launch.tile_tokens(storage.page_size, storage.head_dim, self._dtype.itemsize)
        self._workspace = Workspace(storage, workload, self._dtype)
        fixed, per_slot = _parts(workload.heads, workload.kv_heads)
        parts = (fixed + storage.num_slots * per_slot) * workload.heads
        self._part_out = torch.empty(parts, storage.head_dim, dtype=torch.float32, device=storage.device)
        self._part_lse = torch.empty(parts, dtype=torch.float32, device=storage.device)

    @classmethod
    def supports(cls, layer: LayerFormat) -> str | None:
        return _unsupported(layer.key) or _unsupported(layer.value)

    @classmethod
    def prepare(cls) -> None:
        if interpreted():
            return
        if not torch.cuda.is_available():
            raise KernelsUnavailable("Triton finds no GPU")
        try:
            # Triton builds a part of itself here, with the machine's C compiler.
            triton.runtime.driver.active.get_current_target()
        except Exception as e:
            raise KernelsUnavailable(f"Triton cannot launch kernels: {e}") from e

    @classmethod
    def identity(cls) -> str:
        return f"{cls.name} {triton.__version__}"

    def compile(self, planner: StepPlanner, workload: Workload) -> None:
        if not interpreted():
            try_kernels(self, planner, workload.heads, workload.workspace_tokens)

    @classmethod
    def memory(cls, workload: Workload) -> tuple[KernelMemory, ...]:
        part_bytes = workload.heads * (workload.head_dim + 1) * 4
        fixed, per_slot = (parts * part_bytes for parts in _parts(workload.heads, workload.kv_heads))
        return (
            *Workspace.memory(workload, _product_dtype(workload.dtype).itemsize),
            KernelMemory("decode partial results", fixed, per_slot),
            *TritonPlanner.memory(workload.most_pages),
        )

    def plan(self, step: StepPlan) -> StepPlan | ExtendPlan:
        return self._workspace.plan(step) if step.most_queries > 1 else step

    def attend(
        self, layer: int, plan: StepPlan | ExtendPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=self._dtype, device=q.device)
        if isinstance(plan, ExtendPlan):
            self._workspace.attend(layer, plan, q, k, v, scaling, out)
        elif plan.most_queries:
            self._attend_decode(layer, plan, q, k, v, scaling, out)
        return out.to(q.dtype)

    def store(self, layer: int, plan: StepPlan | ExtendPlan, k: torch.Tensor, v: torch.Tensor) -> None:
        plan = plan.step if isinstance(plan, ExtendPlan) else plan
        if not plan.most_queries:
            return
        storage, buffers = self.storage, self.storage.layers[layer]
        key, value = buffers.key, buffers.value
        # Kernels do not convert what a ring keeps: a model hands over its own dtype.
        k, v = k.to(storage.dtype), v.to(storage.dtype)
        rows = (k, *k.stride()[:2], v, *v.stride()[:2])
        step = (plan.slots, plan.query_start, plan.prefix_lens)
        decode = plan.most_queries == 1
        requests, heads = plan.slots.shape[0], 2 * storage.kv_heads
        completed = 1 if decode else triton.cdiv(plan.most_queries, storage.page_size)
        store_pages_kernel[(requests, completed, heads)](
            *rows, key.pages, value.pages, key.ring, value.ring, key.sinks, value.sinks, storage.nonfinite_blocks, *step,
            plan.pages, plan.pages.stride(0), K=key.format, V=value.format, KV_HEADS=storage.kv_heads,
            RING=storage.ring_length, SINKS=key.sinks.shape[1], DECODE=decode, **launch.pack_options(storage.page_size, storage.head_dim),
        )  # fmt: skip
        if not decode:
            kept = triton.cdiv(min(plan.most_queries, storage.ring_length), launch.ROW_TOKENS)
            store_rows_kernel[(requests, kept, heads)](
                *rows, key.ring, value.ring, *step, HEAD_DIM=storage.head_dim, KV_HEADS=storage.kv_heads,
                RING=storage.ring_length, TOKENS=launch.ROW_TOKENS,
            )  # fmt: skip

    @staticmethod
    def pack_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
        blocks = torch.empty(x.shape[0], fmt.block_bytes, dtype=torch.uint8, device=x.device)
        pack_pages_kernel[(x.shape[0],)](
            x.contiguous(), blocks, fmt, **launch.pack_options(fmt.page_size, fmt.head_dim)
        )
        return blocks

    def _attend_decode(
        self, layer: int, plan: StepPlan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float,
        out: torch.Tensor,
    ) -> None:  # fmt: skip
        storage, buffers = self.storage, self.storage.layers[layer]
        key, value = buffers.key, buffers.value
        (rows, heads, head_dim), kv_heads = q.shape, storage.kv_heads
        blocks = _head_blocks(heads, kv_heads)
        parts = decode_splits(rows * blocks, q.device) + 1
        part_out, part_lse = self._part_out, self._part_lse
        if rows * heads * parts > len(part_lse):
            raise ValueError(f"a decode step of {rows} requests, {heads} heads: its kernels were made for less")
        attend_decode_kernel[(rows, blocks, parts)](
            q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], key.pages, value.pages, key.ring, value.ring,
            key.sinks, value.sinks, plan.slots, plan.prefix_lens, plan.packed_end, plan.pages, plan.pages.stride(0),
            part_out, part_lse, scaling, K=key.format, V=value.format, HEADS=heads, KV_HEADS=kv_heads,
            RING=storage.ring_length, SINKS=key.sinks.shape[1], SPLITS=parts - 1, TOKENS=self._tokens,
            DOT=_DOTS[self._dtype], **launch.attend_options(head_dim),
        )  # fmt: skip
        merge_splits_kernel[(rows * heads,)](part_out, part_lse, out, HEAD_DIM=head_dim, PARTS=parts)


def decode_splits(programs: int, device: torch.device) -> int:
    """In how many parts a decode step reads packed pages, a power of two: with ``programs`` for each part, about two for every
    multiprocessor of the device; 4 in the interpreter. More than one are at most MOST_PROGRAMS in all."""
    wanted = 4 * programs if interpreted() else 2 * _multiprocessors(device)
    return min(1 << max(min(wanted, MOST_PROGRAMS) // programs, 1).bit_length() - 1, MOST_SPLITS)


def _parts(heads: int, kv_heads: int) -> tuple[int, int]:
    """Parts of a decode step that every query head has at most: in any case, and more for each request. Each request has a split
    and its newest tokens; splits beyond one are at most MOST_PROGRAMS in all blocks of heads."""
    return MOST_PROGRAMS // _head_blocks(heads, kv_heads), 2


def _head_blocks(heads: int, kv_heads: int) -> int:
    """Programs for the query heads of a request, 16 of one KV head at most in each."""
    return kv_heads * triton.cdiv(heads // kv_heads, 16)


def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which matrices are multiplied, for a cache of ``dtype``."""
    # The interpreter multiplies bfloat16 matrices wrongly and truncates what it rounds to bfloat16.
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _unsupported(fmt: TensorFormat) -> str | None:
    if not isinstance(fmt.layout, VectorLayout):
        return f"pages of {fmt.page_size} tokens and heads of {fmt.head_dim} do not fill vectors at {fmt.nbits} bits"
    reduction = fmt.head_dim if fmt.token_lanes else fmt.page_size
    if reduction % 16:
        return f"pages of {fmt.page_size} tokens and heads of {fmt.head_dim} do not both divide by 16"
    if fmt.head_dim > MOST_HEAD_DIM:
        return f"heads of {fmt.head_dim} are larger than {MOST_HEAD_DIM}"
    if fmt.page_size * fmt.head_dim > MOST_ELEMENTS:
        return f"pages of {fmt.page_size} tokens with heads of {fmt.head_dim} are larger than {MOST_ELEMENTS} elements"
    return None
