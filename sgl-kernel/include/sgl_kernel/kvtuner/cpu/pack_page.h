// Quantizes and packs one page of one head.
#pragma once

#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/hadamard.h>
#include <sgl_kernel/kvtuner/cpu/simd.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

// What a group's parameters follow from, lane by lane of some of its elements or of as many groups.
struct GroupRange {
  F low, high, magnitude;  // magnitude: the largest, of which NaN is larger than all

  explicit GroupRange(F x) : low(x), high(x), magnitude(f_abs(x)) {}

  void add(F x) {
    low = f_min(low, x);
    high = f_max(high, x);
    magnitude = f_peak(magnitude, f_abs(x));
  }
};

inline GroupParameters parameters_of(const BlockFormat& f, float low, float high, float magnitude) {
  return bits_of(magnitude) >= kInfinityBits ? kNonfiniteGroup : group_parameters(f, low, high);
}

inline GroupParameters parameters_of(const BlockFormat& f, const float* group) {
  if (kLanesInRegisters && f.group_size % kLanes == 0) {
    GroupRange range(f_load(group));
    for (int i = kLanes; i < f.group_size; i += kLanes) range.add(f_load(group + i));
    return parameters_of(f, f_hmin(range.low), f_hmax(range.high), f_hpeak(range.magnitude));
  }
  float low = group[0], high = group[0];
  uint32_t magnitude = 0;
  for (int i = 0; i < f.group_size; ++i) {
    const uint32_t bits = bits_of(group[i]) & 0x7fffffff;
    low = group[i] < low ? group[i] : low;
    high = group[i] > high ? group[i] : high;
    magnitude = bits > magnitude ? bits : magnitude;
  }
  return parameters_of(f, low, high, float_of(magnitude));
}

// Codes [page_size][head_dim], offset binary, and parameters of a page. Whether all of it is finite.
inline bool quantize_per_token(const BlockFormat& f, const float* x, uint16_t* scales, int16_t* zeros, uint8_t* codes) {
  const int offset = f.offset();
  bool finite = true;
  for (int t = 0; t < f.page_size; ++t)
    for (int g = 0; g < f.groups(); ++g) {
      const float* group = x + t * f.head_dim + g * f.group_size;
      uint8_t* to = codes + t * f.head_dim + g * f.group_size;
      const GroupParameters p = parameters_of(f, group);
      const int at = g * f.page_size + t;
      scales[at] = p.scale;
      if (f.asym) zeros[at] = p.zero;
      if (p.scale == kHalfNan) {
        finite = false;
        memset(to, offset, f.group_size);
        continue;
      }
      const float scale = scale_of_half(p.scale), zero = p.zero;
      for (int i = 0; i < f.group_size; ++i) to[i] = code_of(group[i], scale, zero, offset);
    }
  return finite;
}

inline bool quantize_per_channel(const BlockFormat& f, const float* x, uint16_t* scales, int16_t* zeros,
                                 uint8_t* codes) {
  const int offset = f.offset(), dim = f.head_dim;
  bool finite = true;
  for (int g = 0; g < f.groups(); ++g)
    for (int from = 0; from < dim; from += kLanes) {
      const float* first = x + g * f.group_size * dim + from;
      uint8_t* to = codes + g * f.group_size * dim + from;
      GroupRange range(f_load(first));
      for (int t = 1; t < f.group_size; ++t) range.add(f_load(first + t * dim));
      float low[kLanes], high[kLanes], magnitude[kLanes], scale[kLanes], zero[kLanes];
      f_store(low, range.low), f_store(high, range.high), f_store(magnitude, range.magnitude);
      bool damaged[kLanes], any = false;
      for (int i = 0; i < kLanes; ++i) {
        const GroupParameters p = parameters_of(f, low[i], high[i], magnitude[i]);
        const int at = g * dim + from + i;
        scales[at] = p.scale;
        if (f.asym) zeros[at] = p.zero;
        damaged[i] = p.scale == kHalfNan;
        any |= damaged[i];
        scale[i] = damaged[i] ? 1.f : scale_of_half(p.scale);
        zero[i] = p.zero;
      }
      for (int t = 0; t < f.group_size; ++t)
        for (int i = 0; i < kLanes; ++i) to[t * dim + i] = code_of(first[t * dim + i], scale[i], zero[i], offset);
      if (!any) continue;
      finite = false;
      for (int t = 0; t < f.group_size; ++t)
        for (int i = 0; i < kLanes; ++i)
          if (damaged[i]) to[t * dim + i] = (uint8_t)offset;
    }
  return finite;
}

// Places the codes of a page, bytes [page_size][head_dim] or bfloat16 words, in a block.
template <int BITS, class Code>
inline void place_codes(const BlockFormat& f, const Code* codes, uint8_t* block) {
  constexpr int span = 32 / BITS;
  const int reduction_stride = f.token_lanes ? 1 : f.head_dim, lane_stride = f.token_lanes ? f.head_dim : 1;
  for (int r = 0; r < f.reduction(); r += span) {
    uint8_t* to = block + f.word_of(r, 0);
    for (int l = 0; l < f.lanes(); ++l) {
      const Code* from = codes + r * reduction_stride + l * lane_stride;
      uint32_t word = 0;
#pragma GCC unroll 16
      for (int e = 0; e < span; ++e) word |= (uint32_t)from[e * reduction_stride] << bit_in_word(BITS, e);
      memcpy(to + l * kWordBytes, &word, kWordBytes);
    }
  }
}

inline bool pack_bf16(const BlockFormat& f, float* x, uint8_t* block) {
  const int count = f.page_size * f.head_dim;
  uint16_t* values = (uint16_t*)x;  // in place: a value is written after the wider one that it comes from was read
  uint32_t largest = 0;
  for (int i = 0; i < count; ++i) {
    float element;
    memcpy(&element, (const char*)x + i * 4, 4);
    const uint16_t value = bf16_of(element);
    const uint32_t magnitude = value & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
    memcpy((char*)values + i * 2, &value, 2);
  }
  place_codes<16>(f, values, block);
  return largest < kInfinityBits >> 16;
}

inline bool pack_page(const BlockFormat& f, float* x, uint8_t* block, uint8_t* codes) {
  if (f.hadamard)
    for (int t = 0; t < f.page_size; ++t) rotate_row(x + t * f.head_dim, f.head_dim, f.hadamard, (float*)codes);
  if (f.nbits == 16) return pack_bf16(f, x, block);
  uint16_t* scales = (uint16_t*)(block + f.code_bytes());
  int16_t* zeros = (int16_t*)(block + f.code_bytes() + f.scale_bytes());
  const bool finite = (f.axis == 0 ? quantize_per_token : quantize_per_channel)(f, x, scales, zeros, codes);
  switch (f.nbits) {
    case 2:
      place_codes<2>(f, codes, block);
      break;
    case 4:
      place_codes<4>(f, codes, block);
      break;
    default:
      place_codes<8>(f, codes, block);
  }
  return finite;
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
