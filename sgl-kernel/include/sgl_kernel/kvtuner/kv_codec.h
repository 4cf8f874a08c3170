// The packed form of one page of one KV head, to the byte: the one definition for every kernel.
//
// Plain C++ without torch, for host and device. `page_codec.py` is its reference in torch; both agree byte for byte.
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
constexpr int kVectorBytes = 64;
constexpr int kParameterBytes = 2;
constexpr float kRangeFloor = 1e-5f;
constexpr float kMaxStoredZero = 32000.f;
constexpr float kHalfStep = 5.9604644775390625e-08f;  // 2^-24, the smallest positive float16
constexpr float kHalfMax = 65504.f;

// bits: 2, 4, 8, or 16 for bfloat16. axis: 0 groups along head_dim, 1 along tokens. token_lanes: true for keys.
// hadamard: rows are rotated in blocks of that many channels before they are quantized (cpu/hadamard.h); 0: they are
// not.
struct BlockFormat {
  int bits;
  int asym;
  int axis;
  int group;
  int page;
  int head_dim;
  int token_lanes;
  int hadamard = 0;

  KVTUNER_HD constexpr int lanes() const { return token_lanes ? page : head_dim; }
  KVTUNER_HD constexpr int reduction() const { return token_lanes ? head_dim : page; }
  KVTUNER_HD constexpr int span() const { return 32 / bits; }
  // True where a group runs along the reduction, so that its scale applies after the dot product.
  KVTUNER_HD constexpr bool reduction_groups() const { return (axis == 0) == (token_lanes != 0); }
  KVTUNER_HD constexpr int groups() const { return (axis == 0 ? head_dim : page) / group; }
  // Neighbouring parameters: one group's scales for all lanes, or for all of the reduction.
  KVTUNER_HD constexpr int parameters_per_group() const { return axis == 0 ? page : head_dim; }
  KVTUNER_HD constexpr int code_bytes() const { return page * head_dim * bits / 8; }
  KVTUNER_HD constexpr int scale_bytes() const {
    return bits == 16 ? 0 : groups() * parameters_per_group() * kParameterBytes;
  }
  KVTUNER_HD constexpr int zero_bytes() const { return asym ? scale_bytes() : 0; }
  KVTUNER_HD constexpr int block_bytes() const { return code_bytes() + scale_bytes() + zero_bytes(); }
  KVTUNER_HD constexpr int offset() const { return 1 << (bits - 1); }
  // False where lanes or reduction do not fill vectors; such blocks are row-major and no kernel reads them.
  KVTUNER_HD constexpr bool tiled() const { return lanes() % kLanes == 0 && reduction() % span() == 0; }
  // True where the vector bodies apply: groups are whole vectors.
  KVTUNER_HD constexpr bool vector_groups() const {
    return bits == 16 || group % (reduction_groups() ? span() : kLanes) == 0;
  }
  KVTUNER_HD constexpr int parameter_index(int token, int channel) const {
    return axis == 0 ? channel / group * page + token : token / group * head_dim + channel;
  }
  // Byte of the code of (token, channel); shift_of is its lowest bit there. For bits < 16.
  KVTUNER_HD constexpr int byte_of(int token, int channel) const {
    const int r = token_lanes ? channel : token, l = token_lanes ? token : channel;
    const int plane = r % span() / 2;
    return (r / span() * (lanes() / kLanes) + l / kLanes) * kVectorBytes + l % kLanes * 4 + r % 2 * 2 +
           plane * bits / 8;
  }
  KVTUNER_HD constexpr int shift_of(int token, int channel) const {
    return (token_lanes ? channel : token) % span() / 2 * bits % 8;
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
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)((u >> 16) | 0x40);  // NaN stays NaN
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

KVTUNER_HD inline float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// Scale and zero point of a group from its smallest and largest element (quantizer.py with float16 scales).
KVTUNER_HD inline void group_parameters(const BlockFormat& f, float low, float high, uint16_t* scale, int16_t* zero) {
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
  *scale = half_of_scale(clamp(s, kHalfStep, kHalfMax));
  if (f.asym) *zero = (int16_t)(round_even(low / scale_of_half(*scale)) - q_min);
}

// The code of x, offset binary. Clamping before rounding keeps round_even in its range and changes no code.
KVTUNER_HD inline uint8_t code_of(float x, float scale, float zero, int offset) {
  const float bound = (float)offset;
  const float rounded = round_even(clamp(x / scale - zero, -bound - 1.f, bound));
  return (uint8_t)((int)clamp(rounded, -bound, bound - 1.f) + offset);
}

}  // namespace kvtuner
