// Sixteen lanes in one AVX-512 register (F, BW, VL, DQ, VNNI); names as in simd_plain.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include <sgl_kernel/kvtuner/kv_codec.h>

namespace kvtuner::avx512 {
namespace {

constexpr int kMaxVectors = 4;
constexpr int kMaxRows = 5;
constexpr bool kLanesInRegisters = true;

using F = __m512;
using I = __m512i;

inline F f_set(float x) { return _mm512_set1_ps(x); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_div(F a, F b) { return _mm512_div_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_min(F a, F b) { return _mm512_min_ps(a, b); }
inline F f_abs(F a) { return _mm512_abs_ps(a); }
inline float f_hmax(F a) { return _mm512_reduce_max_ps(a); }
inline float f_hmin(F a) { return _mm512_reduce_min_ps(a); }
inline F f_peak(F a, F b) {
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline float f_hpeak(F a) { return float_of(_mm512_reduce_max_epu32(_mm512_castps_si512(a))); }
inline float f_hsum(F a) { return _mm512_reduce_add_ps(a); }

inline I i_set(int32_t x) { return _mm512_set1_epi32(x); }
inline I i_load(const void* p) { return _mm512_loadu_si512(p); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_and(I a, I b) { return _mm512_and_si512(a, b); }
template <int N>
inline I i_shl(I a) {
  return _mm512_slli_epi32(a, N);
}
template <int N>
inline I i_shr16(I a) {
  return _mm512_srli_epi16(a, N);
}
// The intrinsic, but tied to the accumulator's register: GCC 12 copies it around the loops otherwise.
inline I i_dot(I acc, I a, I b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline F as_float(I a) { return _mm512_castsi512_ps(a); }
inline I as_int(F a) { return _mm512_castps_si512(a); }
inline F f_exponent(F x) { return x; }
inline F f_round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for a whole n.
inline F f_times_exp2(F x, F n) { return _mm512_scalef_ps(x, n); }
inline void store_int16(int16_t* p, I a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }
inline F load_int16(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)));
}
inline F load_bf16(const void* p) {
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// The low words of rows plus kRounder are the integers.
inline I store_rounded(int16_t* p, F a, F b, F factor) {
  alignas(64) static constexpr int16_t kLowWords[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                        32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
  const F rounder = f_set(kRounder);
  const I x = as_int(f_fma(a, factor, rounder)), y = as_int(f_fma(b, factor, rounder));
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(x, _mm512_load_si512(kLowWords), y));
  return i_add(i_add(x, y), i_set((int32_t)(0u - 2 * kRounderBits)));
}

// Lane i of the result combines the lanes of x[i].
template <class Combine>
inline F f_each(const F* x, const Combine& f) {
  F y[8], z[4], w[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    y[i] = f(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    z[i] = f(_mm512_shuffle_ps(y[2 * i], y[2 * i + 1], 0x44), _mm512_shuffle_ps(y[2 * i], y[2 * i + 1], 0xee));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    w[i] = f(_mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0x44), _mm512_shuffle_f32x4(z[2 * i], z[2 * i + 1], 0xee));
  return f(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
}
inline F f_hsum_each(const F* x) {
  return f_each(x, [](F a, F b) { return f_add(a, b); });
}
inline F f_hpeak_each(const F* x) {
  return f_each(x, [](F a, F b) { return f_peak(a, b); });
}

// to[column * to_stride + row] = from[row * from_stride + column] for 16 rows and columns.
inline void transpose16(const float* from, int from_stride, float* to, int to_stride) {
  F x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = f_load(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // four rows: x[i + c] has columns c, 4 + c, 8 + c, 12 + c
    x[i] = _mm512_shuffle_ps(y[i], y[i + 2], 0x44);
    x[i + 1] = _mm512_shuffle_ps(y[i], y[i + 2], 0xee);
    x[i + 2] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0x44);
    x[i + 3] = _mm512_shuffle_ps(y[i + 1], y[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const F a = _mm512_shuffle_f32x4(x[c], x[c + 4], 0x88), b = _mm512_shuffle_f32x4(x[c], x[c + 4], 0xdd);
    const F d = _mm512_shuffle_f32x4(x[c + 8], x[c + 12], 0x88), e = _mm512_shuffle_f32x4(x[c + 8], x[c + 12], 0xdd);
    f_store(to + c * to_stride, _mm512_shuffle_f32x4(a, d, 0x88));
    f_store(to + (c + 4) * to_stride, _mm512_shuffle_f32x4(b, e, 0x88));
    f_store(to + (c + 8) * to_stride, _mm512_shuffle_f32x4(a, d, 0xdd));
    f_store(to + (c + 12) * to_stride, _mm512_shuffle_f32x4(b, e, 0xdd));
  }
}

}  // namespace
}  // namespace kvtuner::avx512
