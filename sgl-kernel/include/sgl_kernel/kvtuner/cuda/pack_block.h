// Quantizes and packs one page of one head: the codec's own arithmetic (kv_codec.h), by all threads of a block. Bytes
// are the same on every device, so divisions must be IEEE's: no -use_fast_math.
#pragma once

#include <sgl_kernel/kvtuner/cuda/intrinsics.h>

namespace kvtuner::cuda {

constexpr int kPackThreads = 128;

// Layer: as in decode_format.h, of any page size.
template <class Layer, bool kValue>
struct PagePacker {
  static constexpr BlockFormat format = kValue ? Layer::value : Layer::key;
  static constexpr int dim = format.head_dim, tokens = format.page_size;
  static constexpr int pitch = dim + 1;  // so that a column's elements lie in different banks
  static constexpr int parameters = format.scale_bytes() / kParameterBytes;
  static constexpr int warps = kPackThreads / kWarpLanes;
  static constexpr int shared_bytes = (tokens * pitch + 2 * parameters + warps) * 4;

  float* rows;    // [tokens][pitch]
  float* scales;  // by parameter_index; NaN where the group has an element that is not finite
  float* zeros;
  int* damaged;  // of each warp

  KVTUNER_DEVICE explicit PagePacker(uint8_t* shared)
      : rows((float*)shared),
        scales(rows + tokens * pitch),
        zeros(scales + parameters),
        damaged((int*)(zeros + parameters)) {}

  // All rows are written. Returns, to thread 0, whether something is not finite.
  KVTUNER_DEVICE bool pack(uint8_t* block) {
    sync_block();
    if constexpr (format.hadamard != 0) rotate();
    bool bad = false;
    if constexpr (format.nbits != 16) {
      bad = find_parameters(block);
      sync_block();
    }
    bad |= place_words(block);
    bad = warp_any(bad);
    if (thread_index() % kWarpLanes == 0) damaged[thread_index() / kWarpLanes] = bad;
    sync_block();
    bool any = false;
    KVTUNER_UNROLL
    for (int w = 0; w < warps; ++w) any |= damaged[w] != 0;
    return any;
  }

 private:
  // The order of additions is hadamard.py's.
  KVTUNER_DEVICE void rotate() {
    float scale = 1.f;
    for (int b = format.hadamard; b > 1; b /= 4) scale *= b == 2 ? 0.70710678f : 0.5f;
    for (int distance = 1; distance < format.hadamard; distance *= 2) {
      const float last = 2 * distance == format.hadamard ? scale : 1.f;
      for (int i = thread_index(); i < tokens * dim / 2; i += kPackThreads) {
        const int pair = i % (dim / 2);
        float* at = rows + i / (dim / 2) * pitch + pair / distance * 2 * distance + pair % distance;
        const float a = at[0], b = at[distance];
        at[0] = (a + b) * last, at[distance] = (a - b) * last;
      }
      sync_block();
    }
  }

  KVTUNER_DEVICE bool find_parameters(uint8_t* block) {
    constexpr BlockFormat f = format;
    uint16_t* out = (uint16_t*)(block + f.code_bytes());
    bool bad = false;
    for (int i = thread_index(); i < parameters; i += kPackThreads) {
      const int along = i % f.parameters_per_group(), first = i / f.parameters_per_group() * f.group_size;
      float low = INFINITY, high = -INFINITY;
      uint32_t magnitude = 0;
      for (int e = first; e < first + f.group_size; ++e) {
        const float x = f.axis == 0 ? rows[along * pitch + e] : rows[e * pitch + along];
        const uint32_t bits = bits_of(x) & 0x7fffffff;
        low = x < low ? x : low, high = x > high ? x : high, magnitude = bits > magnitude ? bits : magnitude;
      }
      const GroupParameters group = magnitude >= kInfinityBits ? kNonfiniteGroup : group_parameters(f, low, high);
      const bool finite = group.scale != kHalfNan;
      scales[i] = finite ? scale_of_half(group.scale) : NAN, zeros[i] = group.zero;
      out[i] = group.scale;
      if constexpr (format.asym != 0) out[parameters + i] = (uint16_t)group.zero;
      bad |= !finite;
    }
    return bad;
  }

  // Whole words in the order of their addresses.
  KVTUNER_DEVICE bool place_words(uint8_t* block) {
    constexpr BlockFormat f = format;
    constexpr int span = f.span(), lanes = f.lanes();
    bool bad = false;
    for (int i = thread_index(); i < f.code_bytes() / kWordBytes; i += kPackThreads) {
      const int row = i / lanes, lane = i % lanes;
      uint32_t word = 0;
      KVTUNER_UNROLL
      for (int e = 0; e < span; ++e) {
        const int element = row * span + e, token = f.token_lanes ? lane : element,
                  channel = f.token_lanes ? element : lane;
        const float x = rows[token * pitch + channel];
        uint32_t code;
        if constexpr (format.nbits == 16) {
          code = bf16_of(x);
          bad |= (code & 0x7fff) >= kInfinityBits >> 16;
        } else {
          const int at = f.parameter_index(token, channel);
          const float scale = scales[at];
          code = scale == scale ? code_of(x, scale, zeros[at], f.offset()) : f.offset();
        }
        word |= code << bit_in_word(f.nbits, e);
      }
      ((uint32_t*)block)[i] = word;
    }
    return bad;
  }
};

}  // namespace kvtuner::cuda
