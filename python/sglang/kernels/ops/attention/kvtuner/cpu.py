"""The C++ kernels for CPUs, built on first use.

Sources: sgl-kernel/csrc/kvtuner/cpu and sgl-kernel/include in the repository, ``kernels/jit`` in the package. One build serves
every x86-64 machine: which body runs is chosen at run time (``SGLANG_KVTUNER_CPU_ISA``: avx512, avx2 or plain).
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from functools import cache
from typing import Any

import torch

from sglang.kernels.ops.attention.kvtuner import kernel_cache

logger = logging.getLogger(__name__)

_NAME = "kvtuner_cpu"
_SOURCES = ["kernels", "body_avx512", "body_avx2", "body_plain"]


class KernelBuildError(RuntimeError):
    """The kernels cannot be built or loaded; the message has the missing tool or what the compiler said."""


@cache
@torch.compiler.disable
def module() -> Any:
    """The compiled kernels. Builds them, or finds an earlier build in upstream's cache.

    Raises KernelBuildError, and ValueError when SGLANG_KVTUNER_CPU_ISA asks for what the machine lacks or others than its
    owner can write the cache's folder.
    """
    # Not wrapped by register_custom_op: upstream registers such ops for CUDA alone, and nothing traces this backend.
    from sglang.kernels.jit.utils import load_jit
    from sglang.kernels.jit.utils.compile.cache import cache_root

    logger.info("Preparing the CPU kernels of the quantized KV cache (the first start compiles them, about 20 s)")
    start = time.perf_counter()
    try:
        with kernel_cache.checked(cache_root(), f"sgl_kernel_jit_{_NAME}"):
            # Of several processes that find no build, one builds while the others wait for it.
            loaded = load_jit(
                _NAME,
                cpp_files=[f"kvtuner/cpu/{name}.cpp" for name in _SOURCES],
                # No -march: upstream's cache key does not know the processor, and a cache may be shared by several.
                # Contracted multiply-adds would round differently from the reference quantizer.
                extra_cflags=["-fopenmp", "-ffp-contract=off"],
                extra_ldflags=["-fopenmp"],
                header_only=False,
            )
    except kernel_cache.KernelCacheRefused:
        raise
    except Exception as e:
        # Asked only now: a build that is there needs no ninja, and its compiler only for the version in its key.
        missing = [tool for tool in ("ninja", os.environ.get("CXX", "c++")) if shutil.which(tool) is None]
        reason = f"{' and '.join(missing)} not found on PATH" if missing else e
        raise KernelBuildError(f"the CPU kernels cannot be built: {reason}") from e
    loaded.body_name()  # refuses a forced instruction set that the machine lacks
    logger.info("CPU kernels of the quantized KV cache are ready (%.1f s)", time.perf_counter() - start)
    return loaded
