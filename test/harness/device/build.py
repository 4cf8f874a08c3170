"""Builds the CUDA kernels of one layer format for the host machine, as a library that Python calls."""

import contextlib
import ctypes
import dataclasses
import functools
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "sgl-kernel"
SECONDS = 240
# Bytes are compared, so multiplications and additions must not be contracted.
FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas")


class BuildError(RuntimeError):
    """The compiler refused; its message."""


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=SECONDS)
    if done.returncode:
        raise BuildError(done.stderr[-4000:])
    return done.stdout + done.stderr


def host_compiler():
    """Skips where there is none."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("g++ not found on PATH")
    return compiler


@functools.cache
def build_folder():
    """Goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="device-kernels-")
    build_folder.keep = folder
    return Path(folder.name)


@functools.cache
def machine_objects(portable_fibers=False):
    folder = build_folder() / ("portable" if portable_fibers else "own")
    folder.mkdir()

    def compile_one(source):
        to = folder / f"{source.stem}.o"
        defines = ["-DMACHINE_UCONTEXT"] if portable_fibers else []
        run(host_compiler(), *FLAGS, "-O2", f"-I{KERNELS / 'include'}", *defines, "-c", source, "-o", to)
        return to

    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(compile_one, sorted(HERE.glob("*.cpp"))))


def layer_source(layer, bf16):
    """C++ of what the kernels know of a LayerFormat at compile time."""

    def text(fmt):
        return ", ".join(str(int(value)) for value in dataclasses.astuple(fmt))

    return (
        "#include <sgl_kernel/kvtuner/kv_codec.h>\n"
        "struct Layer {\n"
        f"  static constexpr kvtuner::BlockFormat key{{{text(layer.key)}}};\n"
        f"  static constexpr kvtuner::BlockFormat value{{{text(layer.value)}}};\n"
        f"  static constexpr bool bf16 = {str(bf16).lower()};\n"
        "};\n"
    )


def build_library(layer, bf16, *, kernels=KERNELS, portable_fibers=False):
    """Path of the checked build: the compiler reports every access of the kernels to the machine.

    kernels: a folder like sgl-kernel, for tests that change sources. Raises BuildError.
    """
    folder = Path(tempfile.mkdtemp(dir=build_folder()))
    source, compiled, library = folder / "layer.cpp", folder / "layer.o", folder / "layer.so"
    source.write_text(layer_source(layer, bf16) + "#include <entry.h>\n")
    includes = [f"-I{kernels}", f"-I{kernels / 'include'}", f"-I{HERE}"]
    run(host_compiler(), *FLAGS, "-O1", "-fsanitize=thread", *includes, "-c", source, "-o", compiled)
    # Without the sanitizer's own runtime: the machine defines what the compiler calls.
    objects = machine_objects(portable_fibers)
    run(host_compiler(), "-shared", "-Wl,-Bsymbolic,--no-undefined", compiled, *objects, "-o", library)
    return library


@functools.cache
def load_library(layer, bf16, portable_fibers=False):
    return open_library(build_library(layer, bf16, portable_fibers=portable_fibers))


def load_all(layers):
    """Have the libraries of these (layer, bf16), built on all cores at once."""

    def load(layer):
        with contextlib.suppress(BuildError):  # the test that needs it says so
            load_library(*layer)

    machine_objects(False)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(load, dict.fromkeys(layers)))


def open_library(path):
    library = ctypes.CDLL(str(path))
    library.machine_finding.restype = ctypes.c_char_p
    return library
