// Tiles of out[rows][lanes] (+)= a[rows][reduction] * x[reduction][lanes], x in packed blocks that are never
// dequantized; of several blocks the reductions follow one another.
//
// Rows of `a` are int16 with a scale of their own (relative error about 2^-16, where int8 would cost 1e-2 and bfloat16
// 4e-3); products with codes accumulate exactly in int32.
#pragma once

#include <sgl_kernel/kvtuner/cpu/tile_loops.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

// Rows times codes, with what is to be done with the sums. Scales along the lanes:
// lane_scale * (row_scale * (sum + row_offset) + lane_zero * row_exact). Else: row_scale * sum + row_extra.
//
// Tiles take what they need from one such struct by row and vector of lanes: structs that are copied or changed on the
// way cost a third of a tile.
struct CodeProduct {
  const uint8_t* const* blocks;
  int count;
  int64_t offset;     // of the codes in a block
  int step, vectors;  // bytes between a block's vectors along the reduction; how many of them
  const int16_t* a;
  int64_t a_stride;
  const float* row_scale;  // [rows], step scale_stride
  const float* row_extra;  // [rows], step scale_stride
  int scale_stride;
  const int32_t* row_offset;  // [rows], step sum_stride: what the codes' offset adds
  const float* row_exact;     // [rows], step sum_stride: sums of the floats
  int sum_stride;
  const uint8_t* lane_scale;  // float16 [lanes]
  const uint8_t* lane_zero;   // int16 [lanes] or null
  float* out;
  int out_stride;
  bool accumulate;  // add to out, or replace it
};

template <int BITS, bool LANE_SCALES, int R, int N>
KVTUNER_TILE void code_tile(const CodeProduct& product, int row, int lane_vector, Fetch& fetch) {
  constexpr int planes = 16 / BITS;
  const I mask = i_set(((1 << BITS) - 1) * 0x10001);
  I acc[R][N];
  KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
    const I start = LANE_SCALES ? i_set(product.row_offset[(row + r) * product.sum_stride]) : i_set(0);
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = start;
  }
  const int64_t step = product.step, stride = product.a_stride;
  const int16_t* a = product.a + row * stride;
  for (int block = 0; block < product.count; ++block) {
    const uint8_t* codes = product.blocks[block] + product.offset + lane_vector * kVectorBytes;
    for (int v = product.vectors; v; --v, codes += step, a += planes * 2) {
      fetch.step();
      I x[N];
      KVTUNER_UNROLL for (int n = 0; n < N; ++n) x[n] = i_load(codes + n * kVectorBytes);
      each_plane<planes>([&](auto plane) {
        constexpr int p = plane.value;
        I u[N];
        KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
          u[n] = p ? i_shr16<BITS * p>(x[n]) : x[n];
          if (p < planes - 1) u[n] = i_and(u[n], mask);
        }
        KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
          int32_t pair;
          memcpy(&pair, a + r * stride + p * 2, 4);
          const I q = i_set(pair);
          KVTUNER_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = i_dot(acc[r][n], q, u[n]);
        }
      });
    }
  }
  const CodeProduct& p = anew(product);
  const int scales = row * p.scale_stride;
  const float *row_scale = p.row_scale + scales, *row_extra = p.row_extra + scales;
  const float* row_exact = p.row_exact + row * p.sum_stride;
  float* out = p.out + (int64_t)row * p.out_stride + lane_vector * kLanes;
  const auto finish = [&](auto zeros, auto accumulate) {
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
      const int at = (lane_vector + n) * kLanes * kParameterBytes;
      const F scale = LANE_SCALES ? load_half(p.lane_scale + at) : f_set(1.f);
      const F zero = zeros.value ? load_int16(p.lane_zero + at) : f_set(0.f);
      KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
        float* to = out + (int64_t)r * p.out_stride + n * kLanes;
        const F sum = to_float(acc[r][n]), by = f_set(row_scale[r * p.scale_stride]);
        if constexpr (LANE_SCALES) {
          F y = f_mul(sum, by);
          if (zeros.value) y = f_fma(zero, f_set(row_exact[r * p.sum_stride]), y);
          f_store(to, accumulate.value ? f_fma(scale, y, f_load(to)) : f_mul(scale, y));
        } else {
          const F y = f_fma(sum, by, f_set(row_extra[r * p.scale_stride]));
          f_store(to, accumulate.value ? f_add(y, f_load(to)) : y);
        }
      }
    }
  };
  using No = Constant<0>;
  using Yes = Constant<1>;
  if (LANE_SCALES && p.lane_zero)
    p.accumulate ? finish(Yes{}, Yes{}) : finish(Yes{}, No{});
  else
    p.accumulate ? finish(No{}, Yes{}) : finish(No{}, No{});
}

// Rows times values. BITS 16: bfloat16 pairs as in a 16-bit block. 32: float rows [reduction][step / 4].
struct FloatProduct {
  const uint8_t* const* blocks;
  int count;
  int step, vectors;
  const float* a;
  int a_stride;
  float* out;
  int out_stride;
  bool accumulate;
};

template <int BITS, int R, int N>
KVTUNER_TILE void float_tile(const FloatProduct& p, int row, int lane_vector, Fetch& fetch) {
  constexpr int planes = BITS == 16 ? 2 : 1;
  const float* a = p.a + (int64_t)row * p.a_stride;
  float* out = p.out + (int64_t)row * p.out_stride + lane_vector * kLanes;
  F acc[R][N];
  KVTUNER_UNROLL for (int r = 0; r < R; ++r) KVTUNER_UNROLL for (int n = 0; n < N; ++n) acc[r][n] =
      p.accumulate ? f_load(out + (int64_t)r * p.out_stride + n * kLanes) : f_set(0.f);
  for (int block = 0; block < p.count; ++block) {
    const uint8_t* from = p.blocks[block] + lane_vector * kVectorBytes;
    for (int v = p.vectors; v; --v, from += p.step, a += planes) {
      fetch.step();
      KVTUNER_UNROLL for (int h = 0; h < planes; ++h) {
        F u[N];
        KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
          const I w = i_load(from + n * kVectorBytes);
          u[n] = as_float(BITS == 32 ? w : h ? i_and(w, i_set((int32_t)0xffff0000)) : i_shl<16>(w));
        }
        KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
          const F q = f_set(a[r * p.a_stride + h]);
          KVTUNER_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = f_fma(q, u[n], acc[r][n]);
        }
      }
    }
  }
  KVTUNER_UNROLL for (int r = 0; r < R; ++r) KVTUNER_UNROLL for (int n = 0; n < N; ++n)
      f_store(out + (int64_t)r * p.out_stride + n * kLanes, acc[r][n]);
}

template <int BITS, bool LANE_SCALES>
struct CodeTiles {
  const CodeProduct& product;
  Fetch& fetch;
  template <int R, int N>
  KVTUNER_INLINE void run(int row, int n) const {
    code_tile<BITS, LANE_SCALES, R, N>(product, row, n, fetch);
  }
};

template <int BITS>
struct FloatTiles {
  const FloatProduct& product;
  Fetch& fetch;
  template <int R, int N>
  KVTUNER_INLINE void run(int row, int n) const {
    float_tile<BITS, R, N>(product, row, n, fetch);
  }
};

// Calls tile.run<R, N>(row, vector) until R rows x `vectors` are covered.
template <int R, class Tile>
KVTUNER_INLINE void cover_vectors(int row, int vectors, const Tile& tile) {
  int n = 0;
  if constexpr (kMaxVectors >= 4)
    for (; n + 4 <= vectors; n += 4) tile.template run<R, 4>(row, n);
  if constexpr (kMaxVectors >= 2)
    for (; n + 2 <= vectors; n += 2) tile.template run<R, 2>(row, n);
  for (; n < vectors; ++n) tile.template run<R, 1>(row, n);
}

template <class Tile>
KVTUNER_INLINE void cover(int rows, int vectors, const Tile& tile) {
  for (int row = 0; row < rows;) {
    // The last two tiles are of about the same height.
    const int left = rows - row, now = left <= kMaxRows ? left : left >= 2 * kMaxRows ? kMaxRows : (left + 1) / 2;
    switch (now) {
      case 1:
        cover_vectors<1>(row, vectors, tile);
        break;
      case 2:
        cover_vectors<2>(row, vectors, tile);
        break;
      case 3:
        cover_vectors<3>(row, vectors, tile);
        break;
      case 4:
        cover_vectors<4>(row, vectors, tile);
        break;
      default:
        if constexpr (kMaxRows > 4) cover_vectors<5>(row, vectors, tile);
    }
    row += now;
  }
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
