"""The C++ kernels for CPUs: attention over the packed cache and storing a step, built on first use.

Sources: sgl-kernel/csrc/kvtuner/cpu and sgl-kernel/include in the repository, ``kernels/jit`` in the package. One build serves
every x86-64 machine: which body runs is chosen at run time (``SGLANG_KVTUNER_CPU_ISA``: avx512, avx2 or plain).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from functools import cache
from typing import TYPE_CHECKING

import torch

from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat
from sglang.srt.kvtuner.format.page_codec import tiled

if TYPE_CHECKING:
    from sglang.srt.kvtuner.attention.steps import BatchPlan
    from sglang.srt.kvtuner.cache.pool import KVTunerTokenToKVPool

logger = logging.getLogger(__name__)

_SOURCES = ["kernels", "body_avx512", "body_avx2", "body_plain"]


class KernelsUnavailable(RuntimeError):
    """The kernels cannot serve here; the message says why."""


class CpuKernels:
    """Attention and storing for a pool on the CPU.

    Raises KernelsUnavailable when the kernels cannot be built, or a layer's format does not fill vectors.
    """

    def __init__(self, formats: tuple[LayerFormat, ...]) -> None:
        for layer in formats:
            for fmt in (layer.key, layer.value):
                if reason := unsupported(fmt):
                    raise KernelsUnavailable(reason)
        self._module = module()
        self.name = f"C++ ({self._module.body_name()})"
        self._formats = [format_numbers(layer) for layer in formats]

    def forward(
        self,
        pool: KVTunerTokenToKVPool,
        layer_id: int,
        plan: BatchPlan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Attend, then store the step's own keys and values.

        q: [tokens, heads, head_dim]. k, v: [tokens, kv_heads, head_dim]. Returns [tokens, heads, head_dim] in q's dtype.
        """
        i = layer_id - pool.start_layer
        out = torch.empty(q.shape, dtype=q.dtype)
        cache = (
            k.to(pool.full_precision_dtype),
            v.to(pool.full_precision_dtype),
            pool.window.keys[i],
            pool.window.values[i],
            pool.keys[i],
            pool.values[i],
            pool.sinks.keys[i],
            pool.sinks.values[i],
            plan.sequences,
            plan.pages,
            self._formats[i],
            pool.page_size,
        )
        self._module.attend(q, *cache, scaling, out)
        # Afterwards, since a long chunk overwrites ring rows that its own queries read.
        self._module.store(*cache)
        return out


def unsupported(fmt: TensorFormat) -> str | None:
    """Why the kernels cannot read blocks of ``fmt``, or None."""
    reduction = fmt.head_dim if fmt.token_lanes else fmt.page_size
    if not tiled(fmt) or reduction % 16:
        return f"pages of {fmt.page_size} tokens and heads of {fmt.head_dim} do not both divide by 16"
    group_along_reduction = (fmt.axis == 0) == fmt.token_lanes
    if fmt.group_size % (32 // fmt.nbits if group_along_reduction else 16):
        return f"groups of {fmt.group_size} at {fmt.nbits} bits do not fill vectors"
    return None


def format_numbers(layer: LayerFormat) -> torch.Tensor:
    """int64 [2, 5]: bits, symmetry, axis, group and rotation of keys and of values, as the kernels take them."""
    return torch.tensor(
        [[f.nbits, int(f.asym), f.axis, f.group_size, f.hadamard] for f in (layer.key, layer.value)], dtype=torch.int64
    )


def pack_pages(x: torch.Tensor, fmt: TensorFormat) -> torch.Tensor:
    """What ``page_codec.encode_pages`` does, byte for byte: x [pages, page_size, head_dim] to uint8 [pages, block_bytes]."""
    blocks = torch.empty(x.shape[0], fmt.block_bytes, dtype=torch.uint8)
    module().pack_pages(
        x.contiguous(), blocks, fmt.nbits, int(fmt.asym), fmt.axis, fmt.group_size, int(fmt.token_lanes), fmt.hadamard
    )
    return blocks


@cache
@torch.compiler.disable
def module():
    """The compiled kernels. Builds them, or finds an earlier build in upstream's cache.

    Raises KernelsUnavailable, with the missing tool or what the compiler said, when they cannot be built or loaded, and
    ValueError when SGLANG_KVTUNER_CPU_ISA asks for what the machine lacks.
    """
    # Not wrapped by register_custom_op: upstream registers such ops for CUDA alone, and nothing traces this backend.
    from sglang.kernels.jit.utils import load_jit

    logger.info("Preparing the CPU kernels of the quantized KV cache (the first start compiles them, about 20 s)")
    start = time.perf_counter()
    try:
        # Of several processes that find no build, one builds while the others wait for it.
        loaded = load_jit(
            "kvtuner_cpu",
            cpp_files=[f"kvtuner/cpu/{name}.cpp" for name in _SOURCES],
            # No -march: upstream's cache key does not know the processor, and a cache may be shared by several.
            # Contracted multiply-adds would round differently from the reference quantizer.
            extra_cflags=["-fopenmp", "-ffp-contract=off"],
            extra_ldflags=["-fopenmp"],
            header_only=False,
        )
    except Exception as e:
        # Asked only now: a build that is there needs no ninja, and its compiler only for the version in its key.
        missing = [tool for tool in ("ninja", os.environ.get("CXX", "c++")) if shutil.which(tool) is None]
        reason = f"{' and '.join(missing)} not found on PATH" if missing else e
        raise KernelsUnavailable(f"the CPU kernels cannot be built: {reason}") from e
    loaded.body_name()  # refuses a forced instruction set that the machine lacks
    logger.info("CPU kernels of the quantized KV cache are ready (%.1f s)", time.perf_counter() - start)
    return loaded
