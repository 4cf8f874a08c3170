"""Which kernels serve a cache: one table from device to implementations, and the torch reference for everything else."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence

from sglang.srt.kvtuner.attention.base import Kernels, KernelsUnavailable, Workload
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.config.compatibility import KERNELS_VARIABLE as VARIABLE
from sglang.srt.kvtuner.format.formats import LayerFormat

logger = logging.getLogger(__name__)

REFERENCE = "reference"

_TRITON = ("triton", "sglang.srt.kvtuner.attention.triton", "TritonKernels")
# Implementations by device type, the best first: name, module, class. Modules are imported when they are asked for.
_KERNELS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "cpu": (("cpu", "sglang.srt.kvtuner.attention.cpu", "CpuKernels"),),
    "cuda": (_TRITON,),
}


def choose_kernels(
    device: str, formats: Sequence[LayerFormat], *, prepare: bool = True
) -> tuple[type[Kernels], list[str]]:
    """The best implementation for a cache of ``formats`` on ``device`` ("cpu", "cuda:0"), ready for use unless ``prepare`` is
    False, and for each better one why it is not that.

    ``SGLANG_KVTUNER_KERNELS`` leaves one of them: ``reference`` or a name of the table. On a CPU ``triton`` is valid as well,
    for tests, where TRITON_INTERPRET=1 makes Triton interpret its kernels. Raises ValueError for other values than these and
    "auto".
    """
    kind = str(device).partition(":")[0]
    table = _KERNELS.get(kind, ())
    wanted = os.environ.get(VARIABLE, "auto")
    if kind == "cpu" and wanted == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"{VARIABLE} is 'triton' on a CPU, which is for tests: valid with TRITON_INTERPRET=1 alone, Triton's interpreter"
            )
        table = (_TRITON,)
    names = ["auto", REFERENCE, *(name for name, _, _ in table)]
    if wanted not in names:
        raise ValueError(f"{VARIABLE} is {wanted!r}; valid on {device} are {', '.join(map(repr, names))}")
    if wanted == REFERENCE:
        return ReferenceKernels, [f"{VARIABLE}={wanted}"]
    reasons = [] if table else [f"there are no kernels for {device}"]
    for name, module, attribute in table:
        if wanted not in ("auto", name):
            continue
        kernels: type[Kernels] = getattr(importlib.import_module(module), attribute)
        reason = next(filter(None, map(kernels.supports, formats)), None)
        if reason is None:
            try:
                if prepare:
                    kernels.prepare()
            except KernelsUnavailable as e:
                reason = str(e)
            else:
                return kernels, reasons
        reasons.append(reason)
    return ReferenceKernels, reasons


def why_no_decode_graphs(device: str, formats: Sequence[LayerFormat]) -> str | None:
    """Why CUDA graphs cannot capture decode steps over such a cache, or None where they can; asks nothing of the device."""
    kernels, reasons = choose_kernels(device, formats, prepare=False)
    return None if kernels.graph_safe else f"{kernels.name}: {'; '.join(reasons)}"


def make_kernels(storage: CacheStorage, formats: Sequence[LayerFormat], workload: Workload) -> Kernels:
    """The best kernels over ``storage``; the log says which and, where it is the torch reference, why. Raises as
    :func:`choose_kernels`."""
    kernel_class, reasons = choose_kernels(str(storage.device), formats)
    kernels = kernel_class(storage, workload)
    if kernel_class is ReferenceKernels:
        logger.warning(
            "Attention over the quantized KV cache: %s, which is slow (%s)", kernels.name, "; ".join(reasons)
        )
    else:
        logger.info("Attention over the quantized KV cache: %s", kernels.name)
    return kernels
