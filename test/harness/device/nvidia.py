"""What nvcc makes of the CUDA kernels of a layer: PTX, and machine code with what it needs."""

import re
import shutil
import tempfile
from pathlib import Path

import pytest

from harness.device.build import KERNELS, build_folder, layer_source, run

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")

INSTANCES = """
#include <csrc/kvtuner/cuda/decode.h>
#include <csrc/kvtuner/cuda/store.h>
namespace kvtuner::cuda {
using Format = DecodeFormat<Layer>;
template __global__ void decode_kernel<Format>(const DecodeParameters);
template __global__ void merge_kernel<Format::head_dim, Format::bf16>(const DecodeParameters);
template __global__ void store_kernel<Layer, true>(const StoreParameters);
template __global__ void store_kernel<Layer, false>(const StoreParameters);
template __global__ void store_rows_kernel<Layer>(const StoreParameters);
}
"""


def compiler():
    """Skips where there is none."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc not found on PATH")
    return "nvcc"


def source_of(layer, bf16):
    folder = Path(tempfile.mkdtemp(dir=build_folder()))
    source = folder / "layer.cu"
    source.write_text(layer_source(layer, bf16) + INSTANCES)
    return source


def _compile(source, *flags, kernels=KERNELS):
    return run(compiler(), "-std=c++17", f"-I{kernels}", f"-I{kernels / 'include'}", *flags, source)


def ptx_of(layer, bf16, architecture="sm_89", kernels=KERNELS):
    """kernels: a folder like sgl-kernel, for tests that change sources."""
    source = source_of(layer, bf16)
    _compile(source, f"-arch={architecture}", "-ptx", "-o", source.with_suffix(".ptx"), kernels=kernels)
    return source.with_suffix(".ptx").read_text()


def resources(layer, bf16, architectures=ARCHITECTURES):
    """Registers of a thread and bytes that it spills, per (architecture, kernel)."""
    source = source_of(layer, bf16)
    codes = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures]
    log = _compile(
        source,
        *codes,
        "-cubin" if len(codes) == 1 else "-fatbin",
        "--threads=0",
        "-Xptxas=-v",
        "-o",
        source.with_suffix(".out"),
    )
    found = {}
    kernel = None
    for line in log.splitlines():
        if entry := re.search(
            r"Compiling entry function '\w*?(decode_kernel|merge_kernel|store_rows_kernel|store_kernel)\w*' for '(\w+)'",
            line,
        ):
            kernel = entry[2], entry[1]
        elif spilled := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            found.setdefault(kernel, [0, 0])[1] += int(spilled[1]) + int(spilled[2])
        elif used := re.search(r"Used (\d+) registers", line):
            found[kernel][0] = max(found[kernel][0], int(used[1]))
    return {kernel: tuple(numbers) for kernel, numbers in found.items()}


def page_loop(layer, bf16, architecture, products):
    """Instructions of the loop over pages in the decode kernel, the rarely taken ones too.

    products: of matrices that a page needs, by which the loop is told from others. Skips without Triton's tools.
    """
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("Triton has no cuobjdump")
    source = source_of(layer, bf16)
    cubin = source.with_suffix(".cubin")
    _compile(source, f"-arch={architecture}", "-cubin", "-o", cubin)
    (decode,) = (part for part in run(tool, "-sass", cubin).split("Function : ") if "decode_kernel" in part[:99])
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", decode)]
    loops = []
    for at, text in code:
        target = re.search(r"BRA\S*.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            body = [inside for where, inside in code if int(target[1], 16) <= where <= at]
            if sum("HMMA" in inside for inside in body) >= products:
                loops.append(body)
    return min(loops, key=len)
