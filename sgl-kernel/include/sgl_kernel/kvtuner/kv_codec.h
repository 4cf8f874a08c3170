// The packed form of one page of one KV head, to the byte: the one definition for every kernel.
//
// Plain C++ without torch, for host and device. `layout.py`, `page_codec.py` and `quantizer.py` are its reference in
// torch; both agree byte for byte.
//
// A block is codes, then scales (float16), then zero points (int16, asymmetric only), without padding.
//
// Attention multiplies rows (queries, or probabilities) by the matrix x[reduction][lanes]: for keys the lanes are
// tokens and the reduction is over channels; for values the lanes are channels and the reduction is over tokens.
// Sixteen lanes fill a 64-byte vector. Each of its 32-bit lanes holds neighbours of the reduction, two 16-bit words
// of which each holds 16 / bits codes, so that a shift and a mask give pairs of int16 ready for a pairwise dot product:
//
//   vector [reduction / span][lanes / 16], span = 32 / bits; in a lane, word h, plane p holds element 2 p + h
//
// Codes are offset binary (code - q_min). Parameters lie so that neighbours are what a vector needs: [groups][lanes]
// where a group runs along the reduction, [groups][reduction] where it runs along the lanes. 16 "bits" are bfloat16
// values in the same order (span 2) without parameters.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KVTUNER_HD __host__ __device__
#elif defined(__GNUC__)
// Compilers inline nothing else into code for another instruction set or tuning.
#define KVTUNER_HD __attribute__((always_inline))
#else
#define KVTUNER_HD
#endif

namespace kvtuner {

constexpr int kLanes = 16;
constexpr int kWordBytes = 4;  // of one lane
constexpr int kVectorBytes = kLanes * kWordBytes;
constexpr int kParameterBytes = 2;
constexpr float kRangeFloor = 1e-5f;
constexpr float kMaxStoredZero = 32000.f;
constexpr float kHalfStep = 5.9604644775390625e-08f;  // 2^-24, the smallest positive float16
constexpr float kHalfMax = 65504.f;
constexpr uint16_t kHalfNan = 0x7e00;
constexpr uint16_t kBfloatNan = 0x7fc0;
constexpr uint32_t kInfinityBits = 0x7f800000;

// The lowest bit, in a lane's word, of element 2 p + h of its span: word h, plane p.
KVTUNER_HD constexpr int bit_in_word(int nbits, int element) { return element / 2 * nbits + element % 2 * 16; }

// The format of K or V in one layer, with the fields of Python's TensorFormat (formats.py).
//
// nbits: 2, 4, 8, or 16 for bfloat16. axis: 0 groups along head_dim, 1 along tokens. token_lanes: true for keys.
// hadamard: rows are rotated in blocks of that many channels before they are quantized (cpu/hadamard.h); 0: they are
// not. Which formats kernels read is Python's matter (CpuKernels.supports).
struct BlockFormat {
  int nbits;
  int asym;
  int axis;
  int group_size;
  int page_size;
  int head_dim;
  int token_lanes;
  int hadamard = 0;

  KVTUNER_HD constexpr int lanes() const { return token_lanes ? page_size : head_dim; }
  KVTUNER_HD constexpr int reduction() const { return token_lanes ? head_dim : page_size; }
  KVTUNER_HD constexpr int span() const { return 32 / nbits; }
  // True where a group runs along the reduction, so that its scale applies after the dot product.
  KVTUNER_HD constexpr bool reduction_groups() const { return (axis == 0) == (token_lanes != 0); }
  KVTUNER_HD constexpr int groups() const { return (axis == 0 ? head_dim : page_size) / group_size; }
  // Neighbouring parameters: one group's scales for all lanes, or for all of the reduction.
  KVTUNER_HD constexpr int parameters_per_group() const { return axis == 0 ? page_size : head_dim; }
  KVTUNER_HD constexpr int code_bytes() const { return page_size * head_dim * nbits / 8; }
  KVTUNER_HD constexpr int scale_bytes() const {
    return nbits == 16 ? 0 : groups() * parameters_per_group() * kParameterBytes;
  }
  KVTUNER_HD constexpr int zero_bytes() const { return asym ? scale_bytes() : 0; }
  KVTUNER_HD constexpr int block_bytes() const { return code_bytes() + scale_bytes() + zero_bytes(); }
  KVTUNER_HD constexpr int offset() const { return 1 << (nbits - 1); }

  // Where things lie. Bytes from one vector to the next along the reduction, the lanes being the same:
  KVTUNER_HD constexpr int vector_stride() const { return lanes() * kWordBytes; }
  // The 32-bit word of a lane that holds an element of the reduction, in bytes from the block's start,
  KVTUNER_HD constexpr int word_of(int element, int lane) const {
    return element / span() * vector_stride() + lane * kWordBytes;
  }
  // and the element's lowest bit in it.
  KVTUNER_HD constexpr int bit_of(int element) const { return bit_in_word(nbits, element % span()); }
  // First byte of the code, or bfloat16 value, of (token, channel), and its lowest bit there.
  KVTUNER_HD constexpr int byte_of(int token, int channel) const {
    const int element = token_lanes ? channel : token, lane = token_lanes ? token : channel;
    return word_of(element, lane) + bit_of(element) / 8;
  }
  KVTUNER_HD constexpr int shift_of(int token, int channel) const { return bit_of(token_lanes ? channel : token) % 8; }
  // Place of a group's scale among the scales, and of its zero point among the zero points.
  KVTUNER_HD constexpr int parameter_index(int token, int channel) const {
    return axis == 0 ? channel / group_size * page_size + token : token / group_size * head_dim + channel;
  }
};

static_assert(BlockFormat{4, 0, 0, 64, 64, 64, 1}.block_bytes() == 2048 + 128, "int4 symmetric: 4.25 bits");
static_assert(BlockFormat{4, 1, 1, 64, 64, 128, 1}.block_bytes() == 4096 + 2 * 256, "int4 asymmetric: 4.5 bits");
static_assert(BlockFormat{2, 1, 0, 32, 64, 64, 0}.block_bytes() == 1024 + 2 * 256, "int2, groups of 32: 3 bits");
static_assert(BlockFormat{8, 0, 1, 16, 64, 64, 0}.block_bytes() == 4096 + 512, "int8, groups of 16: 9 bits");
static_assert(BlockFormat{16, 0, 0, 64, 64, 64, 0}.block_bytes() == 8192, "bfloat16");
static_assert(BlockFormat{4, 0, 0, 64, 64, 64, 1}.byte_of(63, 63) == 2047, "the last code is in the last byte");

KVTUNER_HD inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

KVTUNER_HD inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// 1.5 * 2^23: added to x with |x| below 2^22 it rounds x to the nearest whole number, ties to even, which is then in
// the low bits of the sum.
constexpr float kRounder = 12582912.f;
constexpr uint32_t kRounderBits = 0x4b400000;

// As that; the additions vectorize where a library call would not.
KVTUNER_HD inline float round_even(float x) { return (x + kRounder) - kRounder; }

// x within [2^-24, 65504], rounded to nearest even.
KVTUNER_HD inline uint16_t half_of_scale(float x) {
  if (x < 6.103515625e-05f) return (uint16_t)round_even(x * 16777216.f);
  const uint32_t u = bits_of(x);
  return (uint16_t)((u + 0xfff + ((u >> 13) & 1) - (112u << 23)) >> 13);
}

// Finite, non-negative h.
KVTUNER_HD inline float scale_of_half(uint16_t h) {
  return h < 0x400 ? h * kHalfStep : float_of(((uint32_t)h << 13) + (112u << 23));
}

KVTUNER_HD inline uint16_t bf16_of(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) > kInfinityBits) return kBfloatNan;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// NaN becomes low.
KVTUNER_HD inline float clamp(float x, float low, float high) {
  const float y = x > low ? x : low;
  return y < high ? y : high;
}

// What is stored for a group beside its codes.
struct GroupParameters {
  uint16_t scale;  // float16
  int16_t zero;    // 0 where the format is symmetric
};

// Of a group with an element that is NaN or infinite; its codes are 0. Everything that is read from it is NaN, so that
// the damage shows wherever the page goes.
constexpr GroupParameters kNonfiniteGroup{kHalfNan, 0};

// Of a group of finite elements, from the smallest and the largest (quantizer.py with float16 scales). Infinite ranges,
// of elements near the ends of float32, saturate as large ones do.
KVTUNER_HD inline GroupParameters group_parameters(const BlockFormat& f, float low, float high) {
  const float q_min = -(float)f.offset(), q_max = (float)(f.offset() - 1);
  float s;
  if (f.asym) {
    const float range = high - low;
    s = (range < kRangeFloor ? kRangeFloor : range) / (q_max - q_min);
    const float raised = (low < 0 ? -low : low) / kMaxStoredZero + kHalfStep / 2;
    if (raised > s) s = raised;
  } else {
    const float range = -low > high ? -low : high;
    s = (range < kRangeFloor ? kRangeFloor : range) / q_max;
  }
  const uint16_t scale = half_of_scale(clamp(s, kHalfStep, kHalfMax));
  if (!f.asym) return {scale, 0};
  // Beyond an int16 already before it is rounded, so that round_even stays in its range.
  const float zero = round_even(clamp(low / scale_of_half(scale), -65536.f, 65536.f)) - q_min;
  return {scale, (int16_t)clamp(zero, -32768.f, 32767.f)};
}

// The code of x, offset binary. Clamping before rounding keeps round_even in its range and changes no code.
KVTUNER_HD inline uint8_t code_of(float x, float scale, float zero, int offset) {
  const float bound = (float)offset;
  const float rounded = round_even(clamp(x / scale - zero, -bound - 1.f, bound));
  return (uint8_t)((int)clamp(rounded, -bound, bound - 1.f) + offset);
}

}  // namespace kvtuner
