// Queries as operand B of the products with packed keys. A lane holds channels of head g, in the order of the keys'
// words; accumulators are of heads 2 t and 2 t + 1.
#pragma once

#include <sgl_kernel/kvtuner/cuda/decode_format.h>

namespace kvtuner::cuda {

// Rows of a block's heads, rotated (hadamard.py), in float32: [kHeadTile][head_dim] in shared memory. All of the block
// comes here. Heads from `present` on are zeros.
template <class F>
KVTUNER_DEVICE void rotate_queries(const uint16_t* rows, int present, float* to) {
  constexpr BlockFormat key = F::key;
  constexpr int dim = F::head_dim, count = kHeadTile * dim;
  for (int i = thread_index(); i < count / 2; i += F::threads) {
    const uint32_t w = 2 * i / dim < present ? ((const uint32_t*)rows)[i] : 0u;
    to[2 * i] = low_float<F::bf16>(w), to[2 * i + 1] = high_float<F::bf16>(w);
  }
  float scale = 1.f;
  for (int b = key.hadamard; b > 1; b /= 4) scale *= b == 2 ? 0.70710678f : 0.5f;
  for (int distance = 1; distance < key.hadamard; distance *= 2) {
    sync_block();
    for (int i = thread_index(); i < count / 2; i += F::threads) {
      const int at = i / distance * 2 * distance + i % distance;
      const float a = to[at], b = to[at + distance], last = 2 * distance == key.hadamard ? scale : 1.f;
      to[at] = (a + b) * last, to[at + distance] = (a - b) * last;
    }
  }
  sync_block();
}

template <class F>
struct Queries {
  static constexpr BlockFormat key = F::key;
  using U = typename F::KeyUnit;
  // Keys of 16 bits are bfloat16. A float16 query is the sum of two of them, exactly.
  static constexpr int parts = key.nbits == 16 && !F::bf16 ? 2 : 1;

  uint32_t fragment[parts][F::key_units][U::steps][2];
  float logit_scale[2];  // of heads 2 t and 2 t + 1: from accumulators to logits to base 2

  // row: of head g, in the model's dtype.
  KVTUNER_DEVICE void load(const uint16_t* row, bool present, float scale_log2, int lane) {
    load_pairs(
        [&](int channel) {
          const uint32_t w = present ? *(const uint32_t*)(row + channel) : 0u;
          return float2{low_float<F::bf16>(w), high_float<F::bf16>(w)};
        },
        scale_log2, lane);
  }

  // row: of head g, from rotate_queries.
  KVTUNER_DEVICE void load_rotated(const float* row, float scale_log2, int lane) {
    load_pairs([&](int channel) { return *(const float2*)(row + channel); }, scale_log2, lane);
  }

 private:
  template <class Pair>
  KVTUNER_DEVICE void load_pairs(const Pair& pair, float scale_log2, int lane) {
    const int t = lane % 4;
    logit_scale[0] = logit_scale[1] = scale_log2;
    if constexpr (F::key_quantized) {
      const int exponent = exponent_of(pair, t);
      const float down = power_of_two(-exponent);
      each([&](int unit, int step, int half) {
        const float2 x = pair(U::element(unit, step, half, t));
        fragment[0][unit][step][half] = pack_half2(x.x * down, x.y * down);
      });
      KVTUNER_UNROLL
      for (int j = 0; j < 2; ++j) logit_scale[j] *= power_of_two(shuffle(exponent, 4 * (2 * t + j)));
    } else {
      each([&](int unit, int step, int half) {
        const float2 x = pair(U::element(unit, step, half, t));
        const uint32_t w = pack_bfloat2(x.x, x.y);
        fragment[0][unit][step][half] = w;
        if constexpr (parts == 2)
          fragment[1][unit][step][half] = pack_bfloat2(x.x - float_of(w << 16), x.y - float_of(w & 0xffff0000u));
      });
    }
  }

  // The head's queries times 2^-exponent are below 1, so that neither they nor they times a scale of keys, at most
  // 65504, overflow float16.
  template <class Pair>
  KVTUNER_DEVICE int exponent_of(const Pair& pair, int t) {
    float largest = 0;
    each([&](int unit, int step, int half) {
      const float2 x = pair(U::element(unit, step, half, t));
      largest = fmaxf(largest, fmaxf(fabsf(x.x), fabsf(x.y)));
    });
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    const int exponent = (int)(bits_of(largest) >> 23) - 126;
    return largest == 0 ? 0 : exponent < 126 ? exponent : 126;
  }

  template <class Each>
  KVTUNER_DEVICE static void each(const Each& call) {
    KVTUNER_UNROLL
    for (int unit = 0; unit < F::key_units; ++unit) KVTUNER_UNROLL
    for (int step = 0; step < U::steps; ++step) KVTUNER_UNROLL
    for (int half = 0; half < 2; ++half) call(unit, step, half);
  }
};

}  // namespace kvtuner::cuda
