// The products of queries with the keys of a page: S = K Q^T, heads along N, tokens along M.
#pragma once

#include <sgl_kernel/kvtuner/cuda/queries.h>

namespace kvtuner::cuda {

// Sums of a page, before logit_scale: [2 block + j / 2][2 (j % 2) + head], of token 32 block + 4 g + j.
using PageLogits = float[4][4];

template <class F>
struct KeyProduct {
  static constexpr BlockFormat key = F::key;
  using U = typename F::KeyUnit;
  using Expand = KeyCodes<key.nbits>;
  static constexpr int groups = key.groups();
  static constexpr int row_bytes = kPageTokens * kWordBytes;
  static constexpr int constant_groups = F::key_scales_sums ? groups : 1;

  // Per group and head, of per-token formats: what the codes' excess adds to a sum, negative, and the queries' sum,
  // which zero points multiply.
  float bias[constant_groups][2], query_sum[constant_groups][2];

  // The sums come from products with constants, which land in the lanes that need them.
  KVTUNER_DEVICE void prepare(const Queries<F>& q) {
    if constexpr (F::key_scales_sums) {
      constexpr int units = F::key_units / groups;
      const uint32_t one = twice_as_half(1.f);
      const uint32_t ones[4] = {one, one, one, one};
      KVTUNER_UNROLL
      for (int n = 0; n < groups; ++n) {
        float negative[4] = {}, plain[4] = {};
        KVTUNER_UNROLL
        for (int u = n * units; u < (n + 1) * units; ++u) KVTUNER_UNROLL
        for (int step = 0; step < U::steps; ++step) {
          const uint32_t x = twice_as_half(-Expand::excess(2 * step)), y = twice_as_half(-Expand::excess(2 * step + 1));
          const uint32_t a[4] = {x, x, y, y};
          mma<false>(negative, a, q.fragment[0][u][step]);
          if constexpr (F::key_zeros) mma<false>(plain, ones, q.fragment[0][u][step]);
        }
        KVTUNER_UNROLL
        for (int j = 0; j < 2; ++j) bias[n][j] = negative[j], query_sum[n][j] = plain[j];
      }
    }
  }

  KVTUNER_DEVICE void multiply(const Queries<F>& q, const uint8_t* block, int lane, PageLogits& s) const {
    const int g = lane / 4, t = lane % 4;
    if constexpr (F::key_scales_queries)
      scaled_queries(q, block, g, t, s);
    else if constexpr (F::key_scales_sums)
      scaled_sums(q, block, g, t, s);
    else
      unscaled(q, block, g, t, s);
  }

 private:
  template <bool kBf16>
  KVTUNER_DEVICE static void multiply_unit(const uint8_t* codes, int unit, int block, int g, int t,
                                           const uint32_t (&b)[U::steps][2], float (&low)[4], float (&high)[4]) {
    uint32_t h[4][U::words];
    load_unit<key.nbits, Expand>(codes, row_bytes, unit, block, g, t, h);
    KVTUNER_UNROLL
    for (int step = 0; step < U::steps; ++step) multiply_step<kBf16>(h, step, b[step], low, high);
  }

  KVTUNER_DEVICE static void clear(PageLogits& s) {
    KVTUNER_UNROLL
    for (int i = 0; i < 4; ++i) KVTUNER_UNROLL
    for (int j = 0; j < 4; ++j) s[i][j] = 0;
  }

  // bfloat16 pages.
  KVTUNER_DEVICE static void unscaled(const Queries<F>& q, const uint8_t* page, int g, int t, PageLogits& s) {
    clear(s);
    KVTUNER_UNROLL
    for (int part = 0; part < Queries<F>::parts; ++part) KVTUNER_UNROLL
    for (int block = 0; block < 2; ++block) KVTUNER_UNROLL
    for (int u = 0; u < F::key_units; ++u)
      multiply_unit<true>(page, u, block, g, t, q.fragment[part][u], s[2 * block], s[2 * block + 1]);
  }

  // Per token: every group's sum times the token's scale.
  KVTUNER_DEVICE void scaled_sums(const Queries<F>& q, const uint8_t* page, int g, int t, PageLogits& s) const {
    constexpr int units = F::key_units / groups;
    clear(s);
    KVTUNER_UNROLL
    for (int block = 0; block < 2; ++block) KVTUNER_UNROLL
    for (int n = 0; n < groups; ++n) {
      const uint8_t* at = page + key.code_bytes() + (n * kPageTokens + 32 * block + 4 * g) * kParameterBytes;
      const uint2 w = *(const uint2*)at;
      const float scale[4] = {half_low(w.x), half_high(w.x), half_low(w.y), half_high(w.y)};
      float sum[2][4];
      KVTUNER_UNROLL
      for (int i = 0; i < 2; ++i) KVTUNER_UNROLL
      for (int j = 0; j < 4; ++j) sum[i][j] = bias[n][j % 2];
      if constexpr (F::key_zeros) {
        const uint2 z = *(const uint2*)(at + key.scale_bytes());
        const float zero[4] = {short_low(z.x), short_high(z.x), short_low(z.y), short_high(z.y)};
        KVTUNER_UNROLL
        for (int i = 0; i < 2; ++i) KVTUNER_UNROLL
        for (int j = 0; j < 4; ++j) sum[i][j] += zero[2 * i + j / 2] * query_sum[n][j % 2];
      }
      KVTUNER_UNROLL
      for (int u = n * units; u < (n + 1) * units; ++u)
        multiply_unit<false>(page, u, block, g, t, q.fragment[0][u], sum[0], sum[1]);
      KVTUNER_UNROLL
      for (int i = 0; i < 2; ++i) KVTUNER_UNROLL
      for (int j = 0; j < 4; ++j) s[2 * block + i][j] += scale[2 * i + j / 2] * sum[i][j];
    }
  }

  // Per channel: queries times scales. Groups of 64 tokens are both blocks of 32, groups of 32 one.
  KVTUNER_DEVICE static void scaled_queries(const Queries<F>& q, const uint8_t* page, int g, int t, PageLogits& s) {
    constexpr int blocks = 2 / groups;
    KVTUNER_UNROLL
    for (int n = 0; n < groups; ++n) {
      const uint8_t* scales = page + key.code_bytes() + n * F::head_dim * kParameterBytes;
      uint32_t scaled[F::key_units][U::steps][2];
      float start[4] = {};
      KVTUNER_UNROLL
      for (int u = 0; u < F::key_units; ++u) KVTUNER_UNROLL
      for (int step = 0; step < U::steps; ++step) {
        const uint8_t* at = scales + U::element(u, step, 0, t) * kParameterBytes;
        const uint2 w = *(const uint2*)at;
        scaled[u][step][0] = half2_multiply(q.fragment[0][u][step][0], w.x);
        scaled[u][step][1] = half2_multiply(q.fragment[0][u][step][1], w.y);
        add_start(at + key.scale_bytes(), step, scaled[u][step], start);
      }
      KVTUNER_UNROLL
      for (int i = 2 * n * blocks; i < 2 * (n + 1) * blocks; ++i) KVTUNER_UNROLL
      for (int j = 0; j < 4; ++j) s[i][j] = start[j % 2] + start[2 + j % 2];
      KVTUNER_UNROLL
      for (int block = n * blocks; block < (n + 1) * blocks; ++block) KVTUNER_UNROLL
      for (int u = 0; u < F::key_units; ++u)
        multiply_unit<false>(page, u, block, g, t, scaled[u], s[2 * block], s[2 * block + 1]);
    }
  }

  // Sum of scaled query times (zero - excess). A zero point does not fit a half: rows 0-7 of A take its multiple of 64,
  // rows 8-15 the rest and the excess, each of them exact; the caller adds both.
  KVTUNER_DEVICE static void add_start(const uint8_t* zeros, int step, const uint32_t (&b)[2], float (&start)[4]) {
    const uint32_t x = twice_as_half(-Expand::excess(2 * step)), y = twice_as_half(-Expand::excess(2 * step + 1));
    uint32_t a[4] = {0u, x, 0u, y};
    if constexpr (F::key_zeros) {
      const uint2 z = *(const uint2*)zeros;
      const uint32_t base = twice_as_half(-1024.f);
      a[0] = half2_of_shorts(z.x & 0xffc0ffc0u), a[2] = half2_of_shorts(z.y & 0xffc0ffc0u);
      a[1] = half2_add(half2_add(lop3<kMaskedOr>(z.x, 0x003f003f, 0x64006400), base), x);
      a[3] = half2_add(half2_add(lop3<kMaskedOr>(z.y, 0x003f003f, 0x64006400), base), y);
    }
    mma<false>(start, a, b);
  }
};

}  // namespace kvtuner::cuda
