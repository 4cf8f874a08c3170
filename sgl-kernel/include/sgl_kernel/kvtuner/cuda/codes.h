// Codes of a page in shared memory to operands of mma.m16n8k16.
//
// A 32-bit word of the codec holds neighbours of the reduction for one token (keys) or channel (values), even elements
// in its low 16 bits and odd ones in its high. Operand A wants pairs of neighbours of the reduction for rows g and
// g + 8, where lane = 4 g + t. Both the order of the reduction and the order of rows are free as long as operand B and
// whoever reads the result use the same, so pages need no other layout:
//
//   lane t takes the word rows with t = row % 4; a unit is what it takes for some whole k-steps, see Unit
//   lane g takes 16 bytes of a word row: rows 4 g + j of a block of 32. Rows j = 0, 1 are one m-tile's, 2, 3 another's
//
// A code becomes a half by bits alone: it is put below the exponent of a power of two, which stays as an offset.
#pragma once

#include <sgl_kernel/kvtuner/cuda/intrinsics.h>

namespace kvtuner::cuda {

// What lane t holds of the reduction, for whole k-steps of 16.
template <int kBits>
struct Unit {
  static constexpr int span = 32 / kBits;
  static constexpr int rows = kBits == 16 ? 2 : 1;           // word rows of a lane
  static constexpr int steps = kBits == 16 ? 1 : 8 / kBits;  // k-steps
  static constexpr int words = 2 * steps;                    // of halves, for one row of A
  static constexpr int elements = 16 * steps;                // of the reduction, in all lanes

  // The first of the two neighbours that register `half` of operand B, or 2 `half` and 2 `half` + 1 of A, holds.
  KVTUNER_DEVICE static constexpr int element(int unit, int step, int half, int t) {
    return kBits == 16 ? 2 * (4 * (2 * unit + half) + t) : span * (4 * unit + t) + 4 * step + 2 * half;
  }
};

// (a & b) | c
constexpr int kMaskedOr = (kTableA & kTableB) | kTableC;

// Pair p of a word as halves, each of them exactly code + offset(p).
template <int kBits>
struct Codes;

template <>
struct Codes<8> {
  KVTUNER_DEVICE static constexpr float offset(int) { return 1024.f; }
  KVTUNER_DEVICE static void expand(uint32_t w, uint32_t (&h)[2]) {
    h[0] = permute_bytes(w, 0x64646464, 0x4240);
    h[1] = permute_bytes(w, 0x64646464, 0x4341);
  }
};

template <>
struct Codes<4> {
  KVTUNER_DEVICE static constexpr float offset(int p) { return p % 2 ? 64.f : 1024.f; }
  KVTUNER_DEVICE static void expand(uint32_t w, uint32_t (&h)[4]) {
    const uint32_t v = w >> 8;
    h[0] = lop3<kMaskedOr>(w, 0x000f000f, 0x64006400);
    h[1] = lop3<kMaskedOr>(w, 0x00f000f0, 0x54005400);
    h[2] = lop3<kMaskedOr>(v, 0x000f000f, 0x64006400);
    h[3] = lop3<kMaskedOr>(v, 0x00f000f0, 0x54005400);
  }
};

template <>
struct Codes<2> {
  KVTUNER_DEVICE static constexpr float offset(int p) {
    return p == 4 || p == 7 ? 4.f : p == 1 || p == 3 || p == 6 ? 16.f : 64.f;
  }
  KVTUNER_DEVICE static void expand(uint32_t w, uint32_t (&h)[8]) {
    const uint32_t u = w << 4, v = w >> 6;
    h[0] = lop3<kMaskedOr>(u, 0x00300030, 0x54005400);
    h[1] = lop3<kMaskedOr>(u, 0x00c000c0, 0x4c004c00);
    h[2] = lop3<kMaskedOr>(w, 0x00300030, 0x54005400);
    h[3] = lop3<kMaskedOr>(w, 0x00c000c0, 0x4c004c00);
    h[4] = lop3<kMaskedOr>(w, 0x03000300, 0x44004400);
    h[5] = lop3<kMaskedOr>(v, 0x00300030, 0x54005400);
    h[6] = lop3<kMaskedOr>(v, 0x00c000c0, 0x4c004c00);
    h[7] = lop3<kMaskedOr>(v, 0x03000300, 0x44004400);
  }
};

// Keys keep an offset, which a rank-one term in float32 takes off: the accumulator is short-lived, so it costs no
// precision there. Low nibbles are brought from 1024 to 64, so that it is small too.
template <int kBits>
struct KeyCodes {
  // What is in a half beyond the code's value: offset and centre.
  KVTUNER_DEVICE static constexpr float excess(int p) {
    return (kBits == 4 ? 64.f : Codes<kBits>::offset(p)) + (1 << (kBits - 1));
  }
  KVTUNER_DEVICE static void expand(uint32_t w, uint32_t (&h)[16 / kBits]) {
    Codes<kBits>::expand(w, h);
    if constexpr (kBits == 4)
      h[0] = half2_add(h[0], twice_as_half(-960.f)), h[2] = half2_add(h[2], twice_as_half(-960.f));
  }
};

// Values are centred: sums over thousands of tokens must not carry an offset many times the signal.
template <int kBits>
struct ValueCodes {
  KVTUNER_DEVICE static void expand(uint32_t w, uint32_t (&h)[16 / kBits]) {
    Codes<kBits>::expand(w, h);
    KVTUNER_UNROLL
    for (int p = 0; p < 16 / kBits; ++p)
      h[p] = half2_add(h[p], twice_as_half(-(Codes<kBits>::offset(p) + (1 << (kBits - 1)))));
  }
};

// bfloat16 values are operands as they are.
template <>
struct KeyCodes<16> {};
template <>
struct ValueCodes<16> {};

// 16-byte pieces of word rows are swizzled in shared memory: the eight lanes of a quarter warp, whose rows differ in t
// and whose pieces are neighbours in g, then read all banks. Rows hold a multiple of eight pieces.
KVTUNER_DEVICE int swizzled(int piece, int row) { return piece ^ row % 4 * 2; }

// Operand A of both m-tiles of block `block` of 32 rows: h[j] holds the unit's pairs for row 32 block + 4 g + j.
template <int kBits, class Expand>
KVTUNER_DEVICE void load_unit(const uint8_t* codes, int row_bytes, int unit, int block, int g, int t,
                              uint32_t (&h)[4][Unit<kBits>::words]) {
  KVTUNER_UNROLL
  for (int r = 0; r < Unit<kBits>::rows; ++r) {
    const int row = 4 * (Unit<kBits>::rows * unit + r) + t;
    const uint4 w = load16(codes + row * row_bytes + swizzled(8 * block + g, t) * 16);
    KVTUNER_UNROLL
    for (int j = 0; j < 4; ++j)
      if constexpr (kBits == 16)
        h[j][r] = word_of(w, j);
      else
        Expand::expand(word_of(w, j), h[j]);
  }
}

// Multiplies the unit's k-step into both m-tiles: rows 4 g + 0, 1 and rows 4 g + 2, 3.
template <bool kBf16, int kWords>
KVTUNER_DEVICE void multiply_step(const uint32_t (&h)[4][kWords], int step, const uint32_t (&b)[2], float (&low)[4],
                                  float (&high)[4]) {
  const uint32_t first[4] = {h[0][2 * step], h[1][2 * step], h[0][2 * step + 1], h[1][2 * step + 1]};
  const uint32_t second[4] = {h[2][2 * step], h[3][2 * step], h[2][2 * step + 1], h[3][2 * step + 1]};
  mma<kBf16>(low, first, b);
  mma<kBf16>(high, second, b);
}

}  // namespace kvtuner::cuda
