// The instructions that kernels for devices are written in. One source, two machines: under nvcc each function is the
// PTX instruction that its comment names; under a host compiler each is declared only, and a test's machine emulates
// it exactly (test/harness/device).
//
// Registers of two halves are uint32_t, so that no half class has to be emulated. Shared memory is dynamic only. What a
// warp does together goes through here, so that a host machine can hold all lanes to the same instruction.
#pragma once

#ifdef __CUDACC__
#include <sgl_kernel/kvtuner/cuda/intrinsics_ptx.h>
#else
#include <sgl_kernel/kvtuner/cuda/intrinsics_host.h>
#endif

namespace kvtuner::cuda {

constexpr int kWarpLanes = 32;

// Truth tables of lop3 are made from these, as its manual has it.
constexpr int kTableA = 0xf0, kTableB = 0xcc, kTableC = 0xaa;

KVTUNER_DEVICE uint4 load16(const void* p) { return *(const uint4*)p; }

KVTUNER_DEVICE uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A normal half, in both halves of a word. Arithmetic alone, so that compilers fold it.
KVTUNER_DEVICE uint32_t twice_as_half(float x) {
  const uint32_t u = bits_of(x), h = (u >> 16 & 0x8000) | (((u & 0x7fffffff) >> 13) - (112 << 10));
  return h | h << 16;
}

// 2^e for e in [-126, 127].
KVTUNER_DEVICE float power_of_two(int e) { return float_of((uint32_t)(127 + e) << 23); }

// The halves of a word in the model's dtype.
template <bool kBf16>
KVTUNER_DEVICE float low_float(uint32_t w) {
  return kBf16 ? float_of(w << 16) : half_low(w);
}

template <bool kBf16>
KVTUNER_DEVICE float high_float(uint32_t w) {
  return kBf16 ? float_of(w & 0xffff0000u) : half_high(w);
}

template <bool kBf16>
KVTUNER_DEVICE uint32_t pack_floats(float low, float high) {
  return kBf16 ? pack_bfloat2(low, high) : pack_half2(low, high);
}

KVTUNER_DEVICE float short_low(uint32_t a) { return (float)(int16_t)(a & 0xffff); }
KVTUNER_DEVICE float short_high(uint32_t a) { return (float)((int32_t)a >> 16); }

}  // namespace kvtuner::cuda
