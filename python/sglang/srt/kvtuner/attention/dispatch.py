"""Which kernels serve a pool: one table from device to kernels, and the torch reference for everything else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from sglang.srt.kvtuner.attention.cpu import CpuKernels, KernelsUnavailable
from sglang.srt.kvtuner.format.formats import LayerFormat

logger = logging.getLogger(__name__)

VARIABLE = "SGLANG_KVTUNER_KERNELS"
REFERENCE = "torch reference"
_KERNELS_OF_DEVICE: dict[str, Callable[[tuple[LayerFormat, ...]], CpuKernels]] = {"cpu": CpuKernels}


def choose_kernels(device: str, formats: tuple[LayerFormat, ...]) -> CpuKernels | None:
    """Kernels for a pool on ``device`` ("cpu", "cuda:0"), or None for the torch reference; the log says which and why.

    ``SGLANG_KVTUNER_KERNELS=reference`` takes the reference; other values than that and "auto" raise ValueError.
    """
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "reference"):
        raise ValueError(f"{VARIABLE} is {wanted!r}; valid are 'auto' and 'reference'")
    make = _KERNELS_OF_DEVICE.get(str(device).partition(":")[0])
    if wanted == "reference":
        reason = f"{VARIABLE}=reference"
    elif make is None:
        reason = f"there are no kernels for {device}"
    else:
        try:
            kernels = make(formats)
        except KernelsUnavailable as e:
            reason = str(e)
        else:
            logger.info("Attention over the quantized KV cache: %s", kernels.name)
            return kernels
    logger.warning("Attention over the quantized KV cache: %s, which is slow (%s)", REFERENCE, reason)
    return None
