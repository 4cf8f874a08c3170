"""Which kernels serve a cache: one table from device to implementations, and the torch reference for everything else."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from sglang.srt.kvtuner.attention.base import Kernels, KernelsUnavailable, Workload
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.config.compatibility import KERNELS_VARIABLE as VARIABLE
from sglang.srt.kvtuner.config.compatibility import kind_of
from sglang.srt.kvtuner.config.flags import KVTunerConfigError, shown
from sglang.srt.kvtuner.format.formats import LayerFormat

logger = logging.getLogger(__name__)

AUTO, REFERENCE = "auto", "reference"

_TRITON = ("triton", "sglang.srt.kvtuner.attention.triton", "TritonKernels")
# Implementations by device type, the best first: name, module, class. Modules are imported when they are asked for.
_KERNELS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "cpu": (("cpu", "sglang.srt.kvtuner.attention.cpu", "CpuKernels"),),
    "cuda": (_TRITON,),
}


class Choice(NamedTuple):
    """kernels: the implementation that serves. reasons: for each better one, why it is not that."""

    kernels: type[Kernels]
    reasons: tuple[str, ...]


def requested_kernels(device: str) -> str:
    """What SGLANG_KVTUNER_KERNELS asks for on ``device`` ("cpu", "cuda:0"): ``auto``, ``reference`` or a name of the table.

    On a CPU ``triton`` is valid as well, for tests, where TRITON_INTERPRET=1 makes Triton interpret its kernels. Raises
    KVTunerConfigError for other values.
    """
    kind, wanted = kind_of(device), os.environ.get(VARIABLE, AUTO)
    if (kind, wanted) == ("cpu", "triton"):
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise KVTunerConfigError(
                f"{VARIABLE} is 'triton' on a CPU, which is for tests: valid with TRITON_INTERPRET=1 alone, Triton's interpreter"
            )
        return wanted
    names = [AUTO, REFERENCE, *(name for name, _, _ in _KERNELS.get(kind, ()))]
    if wanted not in names:
        raise KVTunerConfigError(f"{VARIABLE} is {shown(wanted)}; valid on {kind} are {', '.join(names)}")
    return wanted


def choose_kernels(device: str, formats: Sequence[LayerFormat], *, prepare: bool = True) -> Choice:
    """The best implementation for a cache of ``formats`` on ``device``, ready for use unless ``prepare`` is False.

    A process chooses once: what ranks agreed on, what memory was counted for and what serves is one choice. Raises
    KVTunerConfigError as :func:`requested_kernels`, and where kernels that were asked for by name cannot serve.
    """
    return _choose(kind_of(device), requested_kernels(device), tuple(dict.fromkeys(formats)), prepare)


@cache
def _choose(kind: str, wanted: str, formats: tuple[LayerFormat, ...], prepare: bool) -> Choice:
    if wanted == REFERENCE:
        return Choice(ReferenceKernels, (f"{VARIABLE}={wanted}",))
    table = (_TRITON,) if (kind, wanted) == ("cpu", "triton") else _KERNELS.get(kind, ())
    reasons = [] if table else [f"there are no kernels for {kind}"]
    for name, module, attribute in table:
        if wanted not in (AUTO, name):
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
                return Choice(kernels, tuple(reasons))
        if wanted == name:
            raise KVTunerConfigError(f"{VARIABLE} is {wanted}, but {reason}")
        reasons.append(reason)
    return Choice(ReferenceKernels, tuple(reasons))


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
