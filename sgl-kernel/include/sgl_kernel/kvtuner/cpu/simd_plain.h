// Sixteen lanes in plain C++; the same names in simd_avx2.h and simd_avx512.h.
#pragma once

#include <cstdint>
#include <cstring>

#include <sgl_kernel/kvtuner/kv_codec.h>

namespace kvtuner::plain {
namespace {

// A tile of the products takes up to this many vectors of lanes and rows side by side.
constexpr int kMaxVectors = 1;
constexpr int kMaxRows = 4;
// Whether sixteen lanes are kept in registers, so that vectors pay for sums over a few of them too.
constexpr bool kLanesInRegisters = false;

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};

#define KVTUNER_EACH for (int i = 0; i < 16; ++i)

inline F f_set(float x) {
  F r;
  KVTUNER_EACH r.v[i] = x;
  return r;
}
inline F f_load(const float* p) {
  F r;
  memcpy(r.v, p, 64);
  return r;
}
inline void f_store(float* p, F a) { memcpy(p, a.v, 64); }
inline F f_add(F a, F b) {
  KVTUNER_EACH a.v[i] += b.v[i];
  return a;
}
inline F f_sub(F a, F b) {
  KVTUNER_EACH a.v[i] -= b.v[i];
  return a;
}
inline F f_mul(F a, F b) {
  KVTUNER_EACH a.v[i] *= b.v[i];
  return a;
}
inline F f_div(F a, F b) {
  KVTUNER_EACH a.v[i] /= b.v[i];
  return a;
}
inline F f_fma(F a, F b, F c) {
  KVTUNER_EACH c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline F f_max(F a, F b) {
  KVTUNER_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F f_min(F a, F b) {
  KVTUNER_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline F f_abs(F a) {
  KVTUNER_EACH a.v[i] = float_of(bits_of(a.v[i]) & 0x7fffffff);
  return a;
}
inline float f_hmax(F a) {
  float m = a.v[0];
  KVTUNER_EACH m = a.v[i] > m ? a.v[i] : m;
  return m;
}
inline float f_hmin(F a) {
  float m = a.v[0];
  KVTUNER_EACH m = a.v[i] < m ? a.v[i] : m;
  return m;
}
// The larger of two values that are not negative. NaN is larger than all others, where f_max may lose it.
inline F f_peak(F a, F b) {
  KVTUNER_EACH a.v[i] = bits_of(a.v[i]) > bits_of(b.v[i]) ? a.v[i] : b.v[i];
  return a;
}
inline float f_hpeak(F a) {
  float m = a.v[0];
  KVTUNER_EACH m = bits_of(a.v[i]) > bits_of(m) ? a.v[i] : m;
  return m;
}
inline float f_hsum(F a) {
  float s = 0;
  KVTUNER_EACH s += a.v[i];
  return s;
}

inline I i_set(int32_t x) {
  I r;
  KVTUNER_EACH r.v[i] = x;
  return r;
}
inline I i_load(const void* p) {
  I r;
  memcpy(r.v, p, 64);
  return r;
}
inline I i_add(I a, I b) {
  KVTUNER_EACH a.v[i] += b.v[i];
  return a;
}
inline I i_and(I a, I b) {
  KVTUNER_EACH a.v[i] &= b.v[i];
  return a;
}
template <int N>
inline I i_shl(I a) {
  KVTUNER_EACH a.v[i] = (int32_t)((uint32_t)a.v[i] << N);
  return a;
}
// Both 16-bit words shifted right.
template <int N>
inline I i_shr16(I a) {
  KVTUNER_EACH a.v[i] = (int32_t)((uint32_t)a.v[i] >> N & 0x10001u * (0xffffu >> N));
  return a;
}
// acc + the dot product of each lane's two int16 pairs.
inline I i_dot(I acc, I a, I b) {
  KVTUNER_EACH acc.v[i] += (int16_t)a.v[i] * (int16_t)b.v[i] + (a.v[i] >> 16) * (b.v[i] >> 16);
  return acc;
}
inline F to_float(I a) {
  F r;
  KVTUNER_EACH r.v[i] = (float)a.v[i];
  return r;
}
// Nearest even; |a| below 2^22.
inline I to_int(F a) {
  I r;
  KVTUNER_EACH r.v[i] = (int32_t)(bits_of(a.v[i] + kRounder) - kRounderBits);
  return r;
}
inline F as_float(I a) {
  F r;
  memcpy(r.v, a.v, 64);
  return r;
}
inline I as_int(F a) {
  I r;
  memcpy(r.v, a.v, 64);
  return r;
}
// x as f_round and f_times_exp2 take it, which need not work below -100. NaN stays NaN.
inline F f_exponent(F x) { return f_max(f_set(-100.f), x); }
inline F f_round(F x) {
  KVTUNER_EACH x.v[i] = round_even(x.v[i]);
  return x;
}
// x * 2^n for a whole n; NaN where they are.
inline F f_times_exp2(F x, F n) {
  const F y = as_float(i_add(as_int(x), i_shl<23>(to_int(n))));
  KVTUNER_EACH x.v[i] = x.v[i] == x.v[i] ? y.v[i] : x.v[i];
  return x;
}
inline void store_int16(int16_t* p, I a) { KVTUNER_EACH p[i] = (int16_t)a.v[i]; }
// Stores 32 int16, roundings of a * factor and b * factor, and returns the sums of lanes.
inline I store_rounded(int16_t* p, F a, F b, F factor) {
  const I x = to_int(f_mul(a, factor)), y = to_int(f_mul(b, factor));
  store_int16(p, x);
  store_int16(p + 16, y);
  return i_add(x, y);
}
inline F load_int16(const void* p) {
  int16_t h[16];
  memcpy(h, p, 32);
  F r;
  KVTUNER_EACH r.v[i] = h[i];
  return r;
}
inline F load_bf16(const void* p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  F r;
  KVTUNER_EACH r.v[i] = float_of((uint32_t)h[i] << 16);
  return r;
}
inline F load_half(const void* p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  F r;
  KVTUNER_EACH {
    const uint32_t magnitude = h[i] & 0x7fff, sign = (uint32_t)(h[i] & 0x8000) << 16;
    const float x =
        magnitude >= 0x7c00 ? float_of((magnitude << 13) + (224u << 23)) : scale_of_half((uint16_t)magnitude);
    r.v[i] = float_of(bits_of(x) | sign);
  }
  return r;
}

// Lane i of the result is the sum, or peak, over the lanes of x[i].
inline F f_hsum_each(const F* x) {
  F r;
  KVTUNER_EACH r.v[i] = f_hsum(x[i]);
  return r;
}
inline F f_hpeak_each(const F* x) {
  F r;
  KVTUNER_EACH r.v[i] = f_hpeak(x[i]);
  return r;
}

// to[column * to_stride + row] = from[row * from_stride + column] for 16 rows and columns.
inline void transpose16(const float* from, int from_stride, float* to, int to_stride) {
  for (int c = 0; c < 16; ++c)
    for (int r = 0; r < 16; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

#undef KVTUNER_EACH

}  // namespace
}  // namespace kvtuner::plain
