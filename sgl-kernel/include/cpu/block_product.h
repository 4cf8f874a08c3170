// Tiles of out[rows][lanes] (+)= a[rows][reduction] * x[reduction][lanes], x in a packed block that is never
// dequantized. Included once per body, in its namespace, after a simd_*.h.
//
// Rows of `a` are int16 with a scale of their own (relative error about 2^-16, where int8 would cost 1e-2 and bfloat16
// 4e-3); products with codes accumulate exactly in int32.

// Loops over accumulators must be unrolled for them to stay in registers.
#define KVTUNER_UNROLL _Pragma("GCC unroll 16")

// Lines of a block that is read later, fetched in even steps so that they neither crowd nor come late.
struct Prefetch {
  const uint8_t* at;
  int lines;  // per step

  void fetch(int count) {
    for (int i = 0; i < count; ++i, at += kVectorBytes) __builtin_prefetch(at, 0, 3);
  }
};

// What a tile does with its sums: lane_scale * (row_scale * sum + lane_zero * row_exact) + row_extra.
struct Epilogue {
  const float* row_scale;     // [rows]
  const int32_t* row_sum;     // [rows], step row_stride: sums of the int16, which take the codes' offset away
  const float* row_exact;     // [rows], step row_stride: sums of the floats, for lane_zero
  const float* row_extra;     // [rows] or null: terms of zero points folded into rows
  int row_stride;
  const uint8_t* lane_scale;  // float16 [lanes] or null
  const uint8_t* lane_zero;   // int16 [lanes] or null
  bool accumulate;            // add to out, or replace it
};

template <int P>
struct Plane {
  static constexpr int value = P;
};

// Calls f(Plane<0>) to f(Plane<COUNT - 1>).
template <int COUNT, class Function>
inline void each_plane(const Function& f) {
  if constexpr (COUNT > 1) each_plane<COUNT - 1>(f);
  f(Plane<COUNT - 1>{});
}

template <int BITS, int R, int N>
inline void code_tile(const uint8_t* codes, int step, int vectors, const int16_t* a, int a_stride, const Epilogue& e,
                      float* out, int out_stride, Prefetch& later) {
  constexpr int planes = 16 / BITS;
  const I mask = i_set(((1 << BITS) - 1) * 0x10001);
  I acc[R][N];
  KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
    const I start = i_set(-(1 << (BITS - 1)) * e.row_sum[r * e.row_stride]);
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = start;
  }
  Prefetch fetch = later;
  for (int v = 0; v < vectors; ++v) {
    fetch.fetch(fetch.lines);
    I x[N];
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) x[n] = i_load(codes + (int64_t)v * step + n * kVectorBytes);
    each_plane<planes>([&](auto plane) {
      constexpr int p = plane.value;
      I u[N];
      KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
        u[n] = p ? i_shr16<BITS * p>(x[n]) : x[n];
        if (p < planes - 1) u[n] = i_and(u[n], mask);
      }
      KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
        int32_t pair;
        memcpy(&pair, a + r * a_stride + (v * planes + p) * 2, 4);
        const I q = i_set(pair);
        KVTUNER_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = i_dot(acc[r][n], q, u[n]);
      }
    });
  }
  later.at = fetch.at;
  KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
    const F scale = e.lane_scale ? load_half(e.lane_scale + n * 32) : f_set(1.f);
    const F zero = e.lane_zero ? load_int16(e.lane_zero + n * 32) : f_set(0.f);
    KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
      float* to = out + (int64_t)r * out_stride + n * kLanes;
      F y = f_mul(to_float(acc[r][n]), f_set(e.row_scale[r]));
      if (e.lane_zero) y = f_fma(zero, f_set(e.row_exact[r * e.row_stride]), y);
      if (e.row_extra) y = f_add(y, f_set(e.row_extra[r]));
      f_store(to, e.accumulate ? f_fma(scale, y, f_load(to)) : f_mul(scale, y));
    }
  }
}

// BITS 16: bfloat16 pairs as in a 16-bit block. 32: float rows [reduction][step / 4].
template <int BITS, int R, int N>
inline void float_tile(const uint8_t* x, int step, int vectors, const float* a, int a_stride, float* out, int out_stride,
                       bool accumulate, Prefetch& later) {
  F acc[R][N];
  KVTUNER_UNROLL for (int r = 0; r < R; ++r)
    KVTUNER_UNROLL for (int n = 0; n < N; ++n)
      acc[r][n] = accumulate ? f_load(out + (int64_t)r * out_stride + n * kLanes) : f_set(0.f);
  Prefetch fetch = later;
  for (int v = 0; v < vectors; ++v) {
    fetch.fetch(fetch.lines);
    const uint8_t* from = x + (int64_t)v * step;
    KVTUNER_UNROLL for (int h = 0; h < (BITS == 16 ? 2 : 1); ++h) {
      F u[N];
      KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
        const I w = i_load(from + n * kVectorBytes);
        u[n] = as_float(BITS == 32 ? w : h ? i_and(w, i_set((int32_t)0xffff0000)) : i_shl<16>(w));
      }
      KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
        const F q = f_set(a[r * a_stride + (BITS == 16 ? 2 * v + h : v)]);
        KVTUNER_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = f_fma(q, u[n], acc[r][n]);
      }
    }
  }
  later.at = fetch.at;
  KVTUNER_UNROLL for (int r = 0; r < R; ++r)
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) f_store(out + (int64_t)r * out_stride + n * kLanes, acc[r][n]);
}

// Calls tile.run<R, N>(row, vector) until R rows x `vectors` are covered.
template <int R, class Tile>
inline void cover_vectors(int row, int vectors, const Tile& tile) {
  int n = 0;
  if constexpr (kMaxVectors >= 4)
    for (; n + 4 <= vectors; n += 4) tile.template run<R, 4>(row, n);
  if constexpr (kMaxVectors >= 2)
    for (; n + 2 <= vectors; n += 2) tile.template run<R, 2>(row, n);
  for (; n < vectors; ++n) tile.template run<R, 1>(row, n);
}

template <class Tile>
inline void cover(int rows, int vectors, const Tile& tile) {
  for (int row = 0; row < rows;) {
    // Tiles of about the same height.
    const int left = rows - row, tiles = (left + kMaxRows - 1) / kMaxRows, now = (left + tiles - 1) / tiles;
    switch (now) {
      case 1: cover_vectors<1>(row, vectors, tile); break;
      case 2: cover_vectors<2>(row, vectors, tile); break;
      case 3: cover_vectors<3>(row, vectors, tile); break;
      case 4: cover_vectors<4>(row, vectors, tile); break;
      case 5: if constexpr (kMaxRows >= 5) cover_vectors<5>(row, vectors, tile); break;
      default: if constexpr (kMaxRows >= 6) cover_vectors<6>(row, vectors, tile);
    }
    row += now;
  }
}

template <int BITS>
struct CodeTile {
  const uint8_t* codes;
  int step, vectors;
  const int16_t* a;
  int a_stride;
  Epilogue e;
  float* out;
  int out_stride;
  Prefetch* later;  // for the first rows' tiles

  template <int R, int N>
  void run(int row, int n) const {
    Epilogue mine = e;
    mine.row_scale += row;
    mine.row_sum += row * e.row_stride;
    if (mine.row_exact) mine.row_exact += row * e.row_stride;
    if (mine.row_extra) mine.row_extra += row;
    if (mine.lane_scale) mine.lane_scale += n * 32;
    if (mine.lane_zero) mine.lane_zero += n * 32;
    Prefetch none{};
    code_tile<BITS, R, N>(codes + n * kVectorBytes, step, vectors, a + (int64_t)row * a_stride, a_stride, mine,
                          out + (int64_t)row * out_stride + n * kLanes, out_stride, row || !later ? none : *later);
  }
};

template <int BITS>
struct FloatTile {
  const uint8_t* x;
  int step, vectors;
  const float* a;
  int a_stride;
  float* out;
  int out_stride;
  bool accumulate;
  Prefetch* later;  // for the first rows' tiles

  template <int R, int N>
  void run(int row, int n) const {
    Prefetch none{};
    float_tile<BITS, R, N>(x + n * kVectorBytes, step, vectors, a + (int64_t)row * a_stride, a_stride,
                           out + (int64_t)row * out_stride + n * kLanes, out_stride, accumulate,
                           row || !later ? none : *later);
  }
};
