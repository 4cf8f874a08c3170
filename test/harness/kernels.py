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
from sglang.srt.kvtuner.format.formats import LayerFormat

# Class, and the environment that chooses it.
IMPLEMENTATIONS = {
    "reference": (ReferenceKernels, {}),
    **{f"cpu-{isa}": (CpuKernels, {"SGLANG_KVTUNER_CPU_ISA": isa}) for isa in ("avx512", "avx2", "plain")},
}


def cpu_kernels():
    """The C++ kernels with the body that the environment chooses; skips where they cannot be built or run."""
    reason = _why_no_cpu_kernels(os.environ.get("SGLANG_KVTUNER_CPU_ISA"))
    if reason:
        pytest.skip(reason)
    return CpuKernels


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
    return (1e-5 if kernels is ReferenceKernels else ATTENTION_TOLERANCE) + rounding


def make_case(kernels, key, value, heads, kv_heads, residual, dtype=torch.float32, sinks=0, lengths=(0,)):
    """A cache of one layer, with a request of each length in slots 1, 2, …"""
    pages = sum(length // key.page_size + 12 for length in lengths)
    model = CacheModel(
        kernels, (LayerFormat(key, value, sinks),), heads=heads, kv_heads=kv_heads, residual=residual, dtype=dtype,
        num_slots=len(lengths) + 1, num_pages=pages + 2, max_pages=max(lengths) // key.page_size + 12,
    )  # fmt: skip
    for slot, length in enumerate(lengths, start=1):
        model.begin(slot)
        if length:
            model.step((slot, length), attend=False)
    return model


def run(model, *counts):
    error = model.step(*enumerate(counts, start=1))
    model.check()
    return error
