// The weights of a page, from its logits, and their product with its values.
#pragma once

#include <sgl_kernel/kvtuner/cuda/accumulator.h>
#include <sgl_kernel/kvtuner/cuda/key_product.h>

namespace kvtuner::cuda {

// Weights go through shared memory: accumulators have them by tokens of the keys' words, operand B wants them by
// tokens of the values'. This one exchange makes all combinations of widths the same code.
template <class F>
struct ValueProduct {
  static constexpr BlockFormat value = F::value;
  using U = typename F::ValueUnit;
  using Expand = ValueCodes<value.nbits>;
  static constexpr int sets = F::weight_sets;
  static constexpr int dim = F::head_dim;
  static constexpr int k_steps = kPageTokens / 16;
  static constexpr bool in_bf16 = !F::value_quantized;

  // page: values in shared memory. weights: the warp's buffer for them.
  KVTUNER_DEVICE static void add(PageLogits& s, const float (&logit_scale)[2], const uint8_t* page, uint8_t* weights,
                                 int lane, Accumulator<F>& to) {
    const int g = lane / 4, t = lane % 4;
    Scales scales;
    const int exponent = load_scales(page, g, scales);
    to.raise(s, logit_scale, exponent);
    store_weights(s, logit_scale, scales, page, weights, g, t, to);
    sync_warp();
    KVTUNER_UNROLL
    for (int n = 0; n < sets; ++n) {
      uint32_t b[k_steps][2];
      load_weights(weights + n * F::weight_bytes, lane, b);
      if constexpr (F::value_scales_sums)
        scaled_sums(page, g, t, b, to);
      else
        scaled_weights(page, n, g, t, b, to);
    }
  }

 private:
  // Of the tokens 32 block + 4 g + j that the lane has logits of.
  using Scales = uint2[sets][2];

  KVTUNER_DEVICE static const uint8_t* parameters(const uint8_t* page, int set, int block, int g) {
    return page + value.code_bytes() + (set * kPageTokens + 32 * block + 4 * g) * kParameterBytes;
  }

  // Returns an e such that all scales of the page are below 2^e.
  KVTUNER_DEVICE static int load_scales(const uint8_t* page, int g, Scales& scales) {
    if constexpr (F::value_scales_weights) {
      uint32_t top = 0;
      KVTUNER_UNROLL
      for (int n = 0; n < sets; ++n) KVTUNER_UNROLL
      for (int block = 0; block < 2; ++block) {
        const uint2 w = *(const uint2*)parameters(page, n, block, g);
        scales[n][block] = w;
        top = half2_max(top, half2_max(w.x, w.y));
      }
      KVTUNER_UNROLL
      for (int mask = 4; mask < kWarpLanes; mask *= 2) top = half2_max(top, shuffle_xor(top, mask));
      return (int)((half2_max(top, top >> 16) & 0x7c00) >> 10) - 14;
    } else {
      return Accumulator<F>::first_exponent;
    }
  }

  KVTUNER_DEVICE static void store_weights(const PageLogits& s, const float (&logit_scale)[2], const Scales& scales,
                                           const uint8_t* page, uint8_t* weights, int g, int t, Accumulator<F>& to) {
    const float unit = power_of_two(-to.exponent);
    KVTUNER_UNROLL
    for (int block = 0; block < 2; ++block) KVTUNER_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float* logits = s[2 * block + j / 2] + j % 2 * 2;
      const float p0 = exp2_approx(logits[0] * logit_scale[0] + to.lowered(0));
      const float p1 = exp2_approx(logits[1] * logit_scale[1] + to.lowered(1));
      to.sum[0] += p0, to.sum[1] += p1;
      KVTUNER_UNROLL
      for (int n = 0; n < sets; ++n) {
        float scale = 1.f;
        if constexpr (F::value_scales_weights) {
          const uint32_t pair = j < 2 ? scales[n][block].x : scales[n][block].y;
          scale = (j % 2 ? half_high(pair) : half_low(pair)) * unit;
        }
        const uint32_t packed = pack_floats<in_bf16>(p0 * scale, p1 * scale);
        *(uint32_t*)(weights + n * F::weight_bytes + (4 * block + j) * F::weight_row_bytes + g * 16 + t * 4) = packed;
        if constexpr (F::value_scales_weights && F::value_zeros) {
          const uint8_t* zeros = parameters(page, n, block, g) + value.scale_bytes() + j / 2 * 4;
          const uint32_t pair = *(const uint32_t*)zeros;
          const float zero = j % 2 ? short_high(pair) : short_low(pair);
          to.zero_sum[n][0] += half_low(packed) * zero, to.zero_sum[n][1] += half_high(packed) * zero;
        }
      }
    }
  }

  // Operand B of all k-steps, in the order of the values' words.
  KVTUNER_DEVICE static void load_weights(const uint8_t* weights, int lane, uint32_t (&b)[k_steps][2]) {
    KVTUNER_UNROLL
    for (int x = 0; x < k_steps / 2; ++x) {  // matrix lane / 8 is register lane / 8 % 2 of k-step 2 x + lane / 16
      const int step = 2 * x + lane / 16, row = lane % 8;
      const int token = U::element(step / U::steps, step % U::steps, lane / 8 % 2, row / 2) + row % 2;
      uint32_t r[4];
      load_matrices_transposed(
          r, weights + (token / 32 * 4 + token % 4) * F::weight_row_bytes + token % 32 / 4 * kHeadTile * 2);
      b[2 * x][0] = r[0], b[2 * x][1] = r[1], b[2 * x + 1][0] = r[2], b[2 * x + 1][1] = r[3];
    }
  }

  KVTUNER_DEVICE static void multiply_unit(const uint8_t* page, int unit, int block, int g, int t,
                                           const uint32_t (&b)[k_steps][2], float (&low)[4], float (&high)[4]) {
    uint32_t h[4][U::words];
    load_unit<value.nbits, Expand>(page, dim * kWordBytes, unit, block, g, t, h);
    KVTUNER_UNROLL
    for (int step = 0; step < U::steps; ++step) multiply_step<in_bf16>(h, step, b[unit * U::steps + step], low, high);
  }

  // Scales are in the weights, or there are none: the channels of group n.
  KVTUNER_DEVICE static void scaled_weights(const uint8_t* page, int n, int g, int t, const uint32_t (&b)[k_steps][2],
                                            Accumulator<F>& to) {
    constexpr int blocks = dim / 32 / sets;
    KVTUNER_UNROLL
    for (int u = 0; u < F::value_units; ++u) KVTUNER_UNROLL
    for (int c = n * blocks; c < (n + 1) * blocks; ++c)
      multiply_unit(page, u, c, g, t, b, to.out[2 * c], to.out[2 * c + 1]);
  }

  // Per channel: sums over a group of tokens times the channel's scale. Zero points multiply the sum of the weights,
  // a product with ones, of which every row is that sum.
  KVTUNER_DEVICE static void scaled_sums(const uint8_t* page, int g, int t, const uint32_t (&b)[k_steps][2],
                                         Accumulator<F>& to) {
    constexpr int groups = value.groups(), units = F::value_units / groups;
    KVTUNER_UNROLL
    for (int n = 0; n < groups; ++n) {
      float total[4] = {};
      if constexpr (F::value_zeros) {
        const uint32_t one = twice_as_half(1.f);
        const uint32_t ones[4] = {one, one, one, one};
        KVTUNER_UNROLL
        for (int step = n * units * U::steps; step < (n + 1) * units * U::steps; ++step)
          mma<false>(total, ones, b[step]);
      }
      KVTUNER_UNROLL
      for (int c = 0; c < dim / 32; ++c) {
        const uint8_t* at = page + value.code_bytes() + (n * dim + 32 * c + 4 * g) * kParameterBytes;
        float sum[2][4] = {};
        KVTUNER_UNROLL
        for (int u = n * units; u < (n + 1) * units; ++u) multiply_unit(page, u, c, g, t, b, sum[0], sum[1]);
        const uint2 w = *(const uint2*)at;
        const float scale[4] = {half_low(w.x), half_high(w.x), half_low(w.y), half_high(w.y)};
        if constexpr (F::value_zeros) {
          const uint2 z = *(const uint2*)(at + value.scale_bytes());
          const float zero[4] = {short_low(z.x), short_high(z.x), short_low(z.y), short_high(z.y)};
          KVTUNER_UNROLL
          for (int i = 0; i < 2; ++i) KVTUNER_UNROLL
          for (int j = 0; j < 4; ++j) sum[i][j] += zero[2 * i + j / 2] * total[j % 2];
        }
        KVTUNER_UNROLL
        for (int i = 0; i < 2; ++i) KVTUNER_UNROLL
        for (int j = 0; j < 4; ++j) to.out[2 * c + i][j] += scale[2 * i + j / 2] * sum[i][j];
      }
    }
  }
};

}  // namespace kvtuner::cuda
