// Sixteen lanes in two AVX2 registers (with FMA and F16C); names as in simd_plain.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include <sgl_kernel/kvtuner/kv_codec.h>

namespace kvtuner::avx2 {
namespace {

constexpr int kMaxVectors = 1;
constexpr int kMaxRows = 4;
constexpr bool kLanesInRegisters = true;

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};

inline F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F f_sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F f_min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F f_abs(F x) {
  const __m256 sign = _mm256_set1_ps(-0.f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline float f_hmax(F x) {
  const __m256 m = _mm256_max_ps(x.a, x.b);
  __m128 n = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  n = _mm_max_ps(n, _mm_movehl_ps(n, n));
  return _mm_cvtss_f32(_mm_max_ss(n, _mm_movehdup_ps(n)));
}
inline float f_hmin(F x) {
  const __m256 m = _mm256_min_ps(x.a, x.b);
  __m128 n = _mm_min_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  n = _mm_min_ps(n, _mm_movehl_ps(n, n));
  return _mm_cvtss_f32(_mm_min_ss(n, _mm_movehdup_ps(n)));
}
inline __m256 peak(__m256 x, __m256 y) {
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(x), _mm256_castps_si256(y)));
}
inline F f_peak(F x, F y) { return {peak(x.a, y.a), peak(x.b, y.b)}; }
inline float f_hpeak(F x) {
  const __m256i m = _mm256_castps_si256(peak(x.a, x.b));
  __m128i n = _mm_max_epu32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  n = _mm_max_epu32(n, _mm_shuffle_epi32(n, 0x4e));
  n = _mm_max_epu32(n, _mm_shuffle_epi32(n, 0xb1));
  return float_of((uint32_t)_mm_cvtsi128_si32(n));
}
inline float f_hsum(F x) {
  const __m256 m = _mm256_add_ps(x.a, x.b);
  __m128 n = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  n = _mm_add_ps(n, _mm_movehl_ps(n, n));
  return _mm_cvtss_f32(_mm_add_ss(n, _mm_movehdup_ps(n)));
}

inline I i_set(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I i_load(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
inline I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I i_and(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int N>
inline I i_shl(I x) {
  return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N>
inline I i_shr16(I x) {
  return {_mm256_srli_epi16(x.a, N), _mm256_srli_epi16(x.b, N)};
}
inline I i_dot(I acc, I x, I y) {
  return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(x.a, y.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(x.b, y.b))};
}
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline I as_int(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F f_exponent(F x) { return f_max(f_set(-100.f), x); }
inline F f_round(F x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
inline F f_times_exp2(F x, F n) { return as_float(i_add(as_int(x), i_shl<23>(to_int(n)))); }
inline void store_int16(int16_t* p, I x) {
  // The pack works in 128-bit halves; the permutation puts them in order.
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8));
}
inline I store_rounded(int16_t* p, F a, F b, F factor) {
  const I x = to_int(f_mul(a, factor)), y = to_int(f_mul(b, factor));
  store_int16(p, x);
  store_int16(p + 16, y);
  return i_add(x, y);
}
inline F load_int16(const void* p) {
  const __m128i* h = (const __m128i*)p;
  return {_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(h))),
          _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(h + 1)))};
}
inline F load_bf16(const void* p) {
  const __m128i* h = (const __m128i*)p;
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(h)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1)), 16))};
}
inline F load_half(const void* p) {
  const __m128i* h = (const __m128i*)p;
  return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}

inline F f_hsum_each(const F* x) {
  float sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = f_hsum(x[i]);
  return f_load(sums);
}
inline F f_hpeak_each(const F* x) {
  float peaks[16];
  for (int i = 0; i < 16; ++i) peaks[i] = f_hpeak(x[i]);
  return f_load(peaks);
}

// to[column * to_stride + row] = from[row * from_stride + column] for 16 rows and columns.
inline void transpose16(const float* from, int from_stride, float* to, int to_stride) {
  for (int c = 0; c < 16; ++c)
    for (int r = 0; r < 16; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace
}  // namespace kvtuner::avx2
