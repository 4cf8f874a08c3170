"""Building the C++ kernels: by several processes at once, again, for other processors, and where it cannot be done."""

import _ctypes
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.kernels import cpu_kernels
from sglang.kernels.jit.utils.compile import toolchain
from sglang.kernels.ops.attention.kvtuner import cpu as cpu_ops
from sglang.srt.kvtuner.attention import cpu, dispatch
from sglang.srt.kvtuner.attention.base import Workload
from sglang.srt.kvtuner.attention.dispatch import make_kernels
from sglang.srt.kvtuner.attention.reference import ReferenceKernels
from sglang.srt.kvtuner.cache.storage import CacheStorage
from sglang.srt.kvtuner.config.flags import KVTunerConfigError
from sglang.srt.kvtuner.format.formats import LayerFormat, TensorFormat

FORMAT = TensorFormat(4, True, 1, 32, 64, 64, True)
PROCESS_SECONDS = 240

# Loads the kernels, or says that the processor lacks what was asked for; compares packed bytes with the reference.
USER = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from sglang.kernels.ops.attention.kvtuner import cpu as cpu_ops
from sglang.srt.kvtuner.attention.cpu import CpuKernels
from sglang.srt.kvtuner.format.formats import TensorFormat
from sglang.srt.kvtuner.format.page_codec import pack_pages
fmt = TensorFormat(4, True, 1, 32, 64, 64, True)
pages = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0))
try:
    right = torch.equal(CpuKernels.pack_pages(pages, fmt), pack_pages(pages, fmt))
    print(cpu_ops.module().body_name(), "right" if right else "wrong")
except ValueError as error:
    print("refused:", error)
"""


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def start(cache, **env):
    environment = {**os.environ, "SGLANG_JIT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [sys.executable, "-c", USER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """(last line of its output, its log)."""
    try:
        output, log = process.communicate(timeout=PROCESS_SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, log
    return output.splitlines()[-1], log


def contents(folder):
    """Files below a folder with their time and size. Upstream's lock file is no content."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.mark.server  # for its length: three processes that import sglang, and a build
def test_one_build_serves_all_processes_and_processors(tmp_path):
    """Ranks or servers that start together on an empty cache; forced bodies stand for machines with other processors."""
    cpu_kernels()
    cache, calls = tmp_path / "cache", tmp_path / "calls"
    real = shutil.which(os.environ.get("CXX", "c++"))
    # Unoptimized, which takes a sixth of the time and gives the same bytes.
    compiler = executable(tmp_path / "c++", f'#!/bin/sh\necho "$@" >> {calls}\nexec {real} "$@" -O0\n')

    def compilations():
        return [command for command in calls.read_text().splitlines() if " -c " in command]

    together = {body: start(cache, CXX=str(compiler), SGLANG_KVTUNER_CPU_ISA=body) for body in ("avx512", "plain")}
    for body, process in together.items():
        said, log = finish(process)
        assert said == f"{body} right" or (body != "plain" and said.startswith("refused:") and body in said), log
        assert "first start compiles" in log
    assert len(compilations()) == len(cpu_ops._SOURCES), "one process builds, the other waits"
    assert not re.search("-march|-mtune|-mcpu", calls.read_text())
    before = contents(cache)
    assert [path.suffix for path in before].count(".so") == 1, before

    # A ninja that fails proves that nothing is built again.
    tools = tmp_path / "tools"
    tools.mkdir()
    executable(tools / "ninja", "#!/bin/sh\nexit 1\n")
    path = os.pathsep.join([str(tools), os.environ["PATH"]])
    said, log = finish(start(cache, CXX=str(compiler), PATH=path, SGLANG_KVTUNER_CPU_ISA="avx2"))
    assert said == "avx2 right" or (said.startswith("refused:") and "avx2" in said), log
    assert contents(cache) == before
    assert len(compilations()) == len(cpu_ops._SOURCES)

    # A library that was cut short would end the process with SIGBUS, another one has other functions.
    (library,) = cache.rglob("*.so")
    for damage in (library.read_bytes()[:4096], Path(_ctypes.__file__).read_bytes()):
        library.write_bytes(damage)
        said, log = finish(start(cache, CXX=str(compiler), SGLANG_KVTUNER_CPU_ISA="plain"))
        assert said == "plain right" and f"{library} is not what was built there" in log
    assert len(compilations()) == 3 * len(cpu_ops._SOURCES)


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """An empty cache, and a folder of tools that is all of PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("SGLANG_JIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    # Upstream asks once for the compiler, and another test may have asked before.
    monkeypatch.setattr(toolchain, "host_compiler_path", lambda: "c++")
    ninja = shutil.which("ninja", path=os.pathsep.join([os.path.dirname(sys.executable), os.defpath]))
    for chosen_once in (cpu_ops.module, dispatch._choose):
        chosen_once.cache_clear()
    yield tools, ninja
    for chosen_once in (cpu_ops.module, dispatch._choose):
        chosen_once.cache_clear()


def chosen(caplog):
    """The kernels that a cache on the CPU gets, and the warnings."""
    caplog.set_level(logging.WARNING)
    formats = (LayerFormat(FORMAT, FORMAT),)
    storage = CacheStorage.allocate(
        formats,
        num_pages=2,
        num_slots=1,
        ring_length=64,
        residual_length=0,
        kv_heads=1,
        dtype=torch.float32,
        device="cpu",
    )
    return make_kernels(storage, formats, Workload.over(storage, heads=1, most_pages=1)), caplog.text


def test_without_ninja_the_reference_serves_and_says_so(cold, caplog):
    executable(cold[0] / "c++", "#!/bin/sh\nexit 0\n")
    kernels, said = chosen(caplog)
    assert isinstance(kernels, ReferenceKernels)
    assert "torch reference" in said and "ninja not found on PATH" in said


def test_without_a_compiler_the_reference_serves_and_says_so(cold, caplog):
    tools, ninja = cold
    (tools / "ninja").symlink_to(ninja)
    kernels, said = chosen(caplog)
    assert isinstance(kernels, ReferenceKernels)
    assert "torch reference" in said and "c++ not found on PATH" in said


def test_kernels_that_were_asked_for_by_name_are_not_replaced(cold, caplog, monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "cpu")
    with pytest.raises(
        KVTunerConfigError, match="SGLANG_KVTUNER_KERNELS is cpu, but the CPU kernels cannot be built: "
    ):
        chosen(caplog)


def test_a_process_chooses_once(cold, caplog):
    """Memory is counted for what was chosen first, and ranks have compared it: a compiler that comes later changes nothing."""
    assert isinstance(chosen(caplog)[0], ReferenceKernels)
    cpu_ops.module.cache_clear()
    prepared = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu.CpuKernels, "prepare", lambda: prepared.append(1))
        assert isinstance(chosen(caplog)[0], ReferenceKernels)
    assert not prepared


def test_a_compiler_that_fails_is_quoted(cold, caplog, tmp_path):
    tools, ninja = cold
    (tools / "ninja").symlink_to(ninja)
    executable(tools / "c++", "#!/bin/sh\necho 'error: no such option' >&2\nexit 1\n")
    kernels, said = chosen(caplog)
    assert isinstance(kernels, ReferenceKernels)
    assert "torch reference" in said and "error: no such option" in said
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_a_cache_that_cannot_be_written_is_named(cold, caplog, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    tools, ninja = cold
    (tools / "ninja").symlink_to(ninja)
    executable(tools / "c++", "#!/bin/sh\nexit 0\n")
    monkeypatch.setenv("SGLANG_JIT_CACHE_DIR", str(tmp_path / "file"))
    kernels, said = chosen(caplog)
    assert isinstance(kernels, ReferenceKernels)
    assert str(tmp_path / "file") in said
