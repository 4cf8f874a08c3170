// Sixteen lanes in one AVX-512 register (F, BW, VL, DQ, VNNI); names as in simd_plain.h.

constexpr int kMaxVectors = 4;

using F = __m512;
using I = __m512i;

inline F f_set(float x) { return _mm512_set1_ps(x); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_max(F a, F b) { return _mm512_max_ps(a, b); }
inline F f_abs(F a) { return _mm512_abs_ps(a); }
inline float f_hmax(F a) { return _mm512_reduce_max_ps(a); }
inline float f_hsum(F a) { return _mm512_reduce_add_ps(a); }

inline I i_set(int32_t x) { return _mm512_set1_epi32(x); }
inline I i_load(const void* p) { return _mm512_loadu_si512(p); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_sub(I a, I b) { return _mm512_sub_epi32(a, b); }
inline I i_and(I a, I b) { return _mm512_and_si512(a, b); }
inline int32_t i_hsum(I a) { return _mm512_reduce_add_epi32(a); }
template <int N> inline I i_shl(I a) { return _mm512_slli_epi32(a, N); }
template <int N> inline I i_shr(I a) { return _mm512_srli_epi32(a, N); }
inline I i_dot(I acc, I a, I b) { return _mm512_dpwssd_epi32(acc, a, b); }
inline F to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I to_int(F a) { return _mm512_cvtps_epi32(a); }
inline F as_float(I a) { return _mm512_castsi512_ps(a); }
inline void store_int16(int16_t* p, I a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(a)); }
inline F load_int16(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p)));
}
inline F load_bf16(const void* p) {
  return as_float(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
inline F load_half(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
