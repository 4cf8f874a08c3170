"""Every header of the kernels compiles alone, with the host's compiler and, where it is for devices too, with nvcc."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "sgl-kernel"
HEADERS = sorted(ROOT.glob("include/sgl_kernel/kvtuner/**/*.h")) + sorted(ROOT.glob("csrc/kvtuner/**/*.h"))
SECONDS = 240

# Calls all that the codec has in code for a device.
DEVICE_CODE = """
#include <sgl_kernel/kvtuner/kv_codec.h>

__global__ void use(kvtuner::BlockFormat f, const float* x, unsigned char* to, float* back) {
  using namespace kvtuner;
  const int token = threadIdx.x, channel = blockIdx.x;
  const GroupParameters p = x[0] < x[1] ? group_parameters(f, x[0], x[1]) : kNonfiniteGroup;
  const float scale = scale_of_half(p.scale);
  to[f.byte_of(token, channel)] |= code_of(x[2], scale, p.zero, f.offset()) << f.shift_of(token, channel);
  to[f.word_of(channel, token) + f.bit_of(channel) / 8] = 0;
  const unsigned short h = bf16_of(x[3]), s = half_of_scale(clamp(x[4], kHalfStep, kHalfMax));
  memcpy(to + f.code_bytes() + f.parameter_index(token, channel) * kParameterBytes, &p.scale, 2);
  back[0] = float_of(bits_of(x[5]) + h + s) + f.block_bytes() + f.vector_stride();
}
"""


def tool(*names):
    for name in names:
        if shutil.which(name):
            return name
    pytest.skip(f"{' and '.join(names)} not found on PATH")


def check(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr


def alone(tmp_path, header, suffix):
    source = tmp_path / f"alone{suffix}"
    source.write_text(f'#include "{header}"\n#include "{header}"\n')
    return source


@pytest.mark.parametrize("header", HEADERS, ids=lambda path: path.name)
def test_header_compiles_alone(tmp_path, header):
    import tvm_ffi

    compiler, source = tool("g++", "c++"), alone(tmp_path, header, ".cpp")
    include = [f"-I{ROOT / 'include'}", f"-I{tvm_ffi.libinfo.find_include_path()}"]
    needs_ffi = "#include <tvm" in header.read_text() or "fields.h" in header.read_text()
    # tvm-ffi and upstream's just-in-time compiler use C++20; the rest is C++17, as device code may be.
    for standard in ("c++20",) if needs_ffi else ("c++17", "c++20"):
        check(compiler, f"-std={standard}", "-fopenmp", "-fsyntax-only", "-Wno-psabi", *include, source)


def test_the_codec_compiles_alone_for_devices(tmp_path):
    compiler = tool("nvcc")
    source = alone(tmp_path, ROOT / "include/sgl_kernel/kvtuner/kv_codec.h", ".cu")
    source.write_text(source.read_text() + DEVICE_CODE)
    check(compiler, "-std=c++17", f"-I{ROOT / 'include'}", "--ptx", source, "-o", tmp_path / "alone.ptx")


def test_headers_are_guarded_and_found():
    assert {path.name for path in HEADERS} >= {
        "kv_codec.h",
        "attend_body.h",
        "pack_page.h",
        "simd_avx512.h",
        "fields.h",
    }
    for header in HEADERS:
        assert "#pragma once" in header.read_text(), header
