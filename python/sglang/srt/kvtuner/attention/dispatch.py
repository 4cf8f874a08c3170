"""Which kernels serve a cache: one table from device to implementations, and the torch reference for everything else."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence

from sglang.srt.kvtuner.attention.base import Kernels, KernelsUnavailable
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.format.formats import LayerFormat

logger = logging.getLogger(__name__)

VARIABLE = "SGLANG_KVTUNER_KERNELS"
REFERENCE = "reference"

# Implementations by device type, the best first: name, module, class. Modules are imported when they are asked for.
_KERNELS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "cpu": (("cpu", "sglang.srt.kvtuner.attention.cpu", "CpuKernels"),),
}


def kernel_classes(device: str, formats: Sequence[LayerFormat]) -> tuple[list[type[Kernels]], list[str]]:
    """Implementations that take every format on ``device`` ("cpu", "cuda:0"), the best first and the torch reference last, and
    for each that does not the reason.

    ``SGLANG_KVTUNER_KERNELS`` leaves one of them: ``reference`` or a name of the table. Raises ValueError for other values
    than these and "auto".
    """
    table = _KERNELS.get(str(device).partition(":")[0], ())
    wanted = os.environ.get(VARIABLE, "auto")
    names = [REFERENCE, *(name for name, _, _ in table)]
    if wanted not in ("auto", *names):
        raise ValueError(f"{VARIABLE} is {wanted!r}; valid on {device} are {', '.join(map(repr, ['auto', *names]))}")
    found: list[type[Kernels]] = []
    reasons = [] if table else [f"there are no kernels for {device}"]
    if wanted == REFERENCE:
        table, reasons = (), [f"{VARIABLE}={wanted}"]
    for name, module, attribute in table:
        if wanted in ("auto", name):
            kernels = getattr(importlib.import_module(module), attribute)
            reason = next(filter(None, map(kernels.supports, formats)), None)
            if reason is None:
                found.append(kernels)
            else:
                reasons.append(reason)
    return [*found, ReferenceKernels], reasons


def choose_kernels(storage: CacheStorage, formats: Sequence[LayerFormat]) -> Kernels:
    """Kernels for a cache; the log says which and, where it is the torch reference, why. Raises as :func:`kernel_classes`."""
    classes, reasons = kernel_classes(str(storage.device), formats)
    for kernel_class in classes[:-1]:
        try:
            kernels = kernel_class(storage)
        except KernelsUnavailable as e:
            reasons.append(str(e))
        else:
            logger.info("Attention over the quantized KV cache: %s", kernels.name)
            return kernels
    reference = ReferenceKernels(storage)
    logger.warning("Attention over the quantized KV cache: %s, which is slow (%s)", reference.name, "; ".join(reasons))
    return reference
