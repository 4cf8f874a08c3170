"""The implementations of the kernels, and caches of one layer for them."""

import functools
import os

import pytest
import torch

from harness.cache_model import CacheModel
from harness.formats import ATTENTION_TOLERANCE
from sglang.kernels.ops.attention.kvtuner import cpu as cpu_ops
from sglang.srt.kvtuner.attention.cpu import CpuKernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.attention.triton import TritonKernels, interpreted
from sglang.srt.kvtuner.format.formats import LayerFormat

# Class, and the environment that chooses it.
IMPLEMENTATIONS = {
    "reference": (ReferenceKernels, {}),
    **{f"cpu-{isa}": (CpuKernels, {"SGLANG_KVTUNER_CPU_ISA": isa}) for isa in ("avx512", "avx2", "plain")},
    "triton": (TritonKernels, {}),
}


def cpu_kernels():
    """The C++ kernels with the body that the environment chooses; skips where they cannot be built or run."""
    reason = _why_no_cpu_kernels(os.environ.get("SGLANG_KVTUNER_CPU_ISA"))
    if reason:
        pytest.skip(reason)
    return CpuKernels


def triton_kernels():
    """The Triton kernels; skips outside of the interpreter."""
    if not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1 before triton is imported: test_triton.py runs these tests so")
    return TritonKernels


@functools.cache
def _why_no_cpu_kernels(isa):
    try:
        cpu_ops.module().body_name()
    except (cpu_ops.KernelBuildError, ValueError) as e:
        return str(e).splitlines()[0]
    return None


def tolerance(kernels, dtype=torch.float32):
    """Of a row relative to its norm. In half precision the output itself is rounded by half a unit in the last place."""
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    exact = kernels is ReferenceKernels or (kernels is TritonKernels and dtype != torch.float16)
    return (1e-5 if exact else ATTENTION_TOLERANCE) + rounding


def for_an_interpreter(heads, kv_heads, lengths, most):
    """Less of the same: Triton's interpreter takes 30 ms for a page and 10 ms for a tile of attention."""
    heads, kv_heads = (heads // kv_heads, 1) if heads > 4 else (heads, kv_heads)
    return heads, kv_heads, [min(length, most) for length in lengths]


def make_case(kernels, key, value, heads, kv_heads, residual, dtype=torch.float32, sinks=0, lengths=(0,)):
    """A cache of one layer, with a request of each length in slots 1, 2, …"""
    if kernels is TritonKernels:
        heads, kv_heads, lengths = for_an_interpreter(heads, kv_heads, lengths, 6 * key.page_size)
    pages = sum(length // key.page_size + 12 for length in lengths)
    model = CacheModel(
        kernels, (LayerFormat(key, value, sinks),), heads=heads, kv_heads=kv_heads, residual=residual, dtype=dtype,
        num_slots=len(lengths) + 1, num_pages=pages + 2, max_pages=max(lengths) // key.page_size + 12,
    )  # fmt: skip
    if kernels is TritonKernels:
        model.fill = ReferenceKernels(model.storage)
    model.begin_all(lengths)
    return model


def run(model, *counts):
    if isinstance(model.kernels, TritonKernels):
        *_, counts = for_an_interpreter(1, 1, counts, 2 * model.page)
    error = model.step(*enumerate(counts, start=1))
    model.check()
    return error
