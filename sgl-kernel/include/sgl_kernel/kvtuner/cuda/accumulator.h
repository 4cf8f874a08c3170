// A warp's running softmax and result: O = V^T P^T, heads along N, channels along M (FlashAttention, NeurIPS 2022,
// section 3.1; logits to base 2).
#pragma once

#include <sgl_kernel/kvtuner/cuda/decode_format.h>

namespace kvtuner::cuda {

template <class F>
struct Accumulator {
  static constexpr int tiles = F::head_dim / 16;
  static constexpr int zero_sums = F::value_scales_weights && F::value_zeros ? F::weight_sets : 1;
  // Below every scale, so that the first page sets it.
  static constexpr int first_exponent = F::value_scales_weights ? -24 : 0;

  float out[tiles][4];           // [2 block + j / 2][2 (j % 2) + head] of the channels of values' words
  float highest[2], sum[2];      // of heads 2 t, 2 t + 1: the largest logit so far, and this lane's weights
  float zero_sum[zero_sums][2];  // this lane's weights times zero points
  // Weights are kept times scales of values and 2^-exponent: scales are below 2^exponent, so that values of any size
  // keep the weights' precision in halves.
  int exponent;

  KVTUNER_DEVICE void clear() {
    KVTUNER_UNROLL
    for (int i = 0; i < tiles; ++i) KVTUNER_UNROLL
    for (int j = 0; j < 4; ++j) out[i][j] = 0;
    KVTUNER_UNROLL
    for (int j = 0; j < 2; ++j) highest[j] = -INFINITY, sum[j] = 0;
    KVTUNER_UNROLL
    for (int n = 0; n < zero_sums; ++n) zero_sum[n][0] = zero_sum[n][1] = 0;
    exponent = first_exponent;
  }

  // Takes the maxima of more logits, and the exponent of more scales. What has been summed is rescaled only when one of
  // them grew, which is rare after the first pages.
  template <int kTiles>
  KVTUNER_DEVICE void raise(const float (&s)[kTiles][4], const float (&logit_scale)[2], int scale_exponent) {
    float top[2] = {s[0][0], s[0][1]};
    KVTUNER_UNROLL
    for (int i = 0; i < kTiles; ++i) KVTUNER_UNROLL
    for (int j = 0; j < 2; ++j) top[j] = fmaxf(top[j], fmaxf(s[i][j], s[i][2 + j]));
    KVTUNER_UNROLL
    for (int mask = 4; mask < kWarpLanes; mask *= 2) KVTUNER_UNROLL
    for (int j = 0; j < 2; ++j) top[j] = fmaxf(top[j], shuffle_xor(top[j], mask));
    KVTUNER_UNROLL
    for (int j = 0; j < 2; ++j) top[j] *= logit_scale[j];
    if (!warp_any(top[0] > highest[0] || top[1] > highest[1] || scale_exponent > exponent)) return;
    const int next = scale_exponent > exponent ? scale_exponent : exponent;
    const float down = power_of_two(exponent - next);
    exponent = next;
    float factor[2];
    KVTUNER_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float to = fmaxf(highest[j], top[j]);
      const float kept = highest[j] == -INFINITY ? 0.f : exp2_approx(highest[j] - to);
      highest[j] = to, sum[j] *= kept, factor[j] = kept * down;
    }
    KVTUNER_UNROLL
    for (int i = 0; i < tiles; ++i) KVTUNER_UNROLL
    for (int j = 0; j < 4; ++j) out[i][j] *= factor[j % 2];
    KVTUNER_UNROLL
    for (int n = 0; n < zero_sums; ++n) zero_sum[n][0] *= factor[0], zero_sum[n][1] *= factor[1];
  }

  // What to add to a logit before 2^x. A head may have seen nothing but masked tokens.
  KVTUNER_DEVICE float lowered(int head) const { return highest[head] == -INFINITY ? 0.f : -highest[head]; }

  // Sums over lanes, and what has been kept apart: out becomes the sum of weights times values in every lane.
  KVTUNER_DEVICE void finish() {
    KVTUNER_UNROLL
    for (int mask = 4; mask < kWarpLanes; mask *= 2) KVTUNER_UNROLL
    for (int j = 0; j < 2; ++j) {
      sum[j] += shuffle_xor(sum[j], mask);
      if constexpr (F::value_scales_weights && F::value_zeros) KVTUNER_UNROLL
      for (int n = 0; n < zero_sums; ++n) zero_sum[n][j] += shuffle_xor(zero_sum[n][j], mask);
    }
    const float up = power_of_two(exponent);
    KVTUNER_UNROLL
    for (int i = 0; i < tiles; ++i) KVTUNER_UNROLL
    for (int j = 0; j < 4; ++j) out[i][j] = (out[i][j] + zero_sum[i * zero_sums / tiles][j % 2]) * up;
  }
};

}  // namespace kvtuner::cuda
