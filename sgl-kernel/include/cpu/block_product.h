// out[rows][lanes] += a[rows][reduction] * x[reduction][lanes] for x in a packed block, without dequantizing it.
// Included once per body, in its namespace, after a simd_*.h.
//
// Rows of `a` become int16 with a scale of their own (relative error about 2^-16, where int8 would cost 1e-2 and
// bfloat16 4e-3); products with codes then accumulate exactly in int32. Scales of groups along the lanes are folded
// into `a` before; scales of groups along the reduction multiply the sums after; zero points add one term per group.

constexpr int kMaxRows = 6;  // rows of a tile: with four vectors, 24 accumulators and 4 codes fit 32 registers

// Rows as int16: value = element * scale. sum: of the int16 per group along the reduction; exact: of the floats.
struct Rows16 {
  int16_t* element;  // [rows][reduction]
  float* scale;      // [rows]
  float* sum;        // [rows][groups]
  float* exact;      // [rows][groups]
};

// a may be folded already. groups: 1, or those along the reduction.
inline void quantize_rows(const float* a, int stride, int rows, int reduction, int groups, float limit, Rows16 to) {
  const int width = reduction / groups;
  for (int r = 0; r < rows; ++r) {
    const float* row = a + (int64_t)r * stride;
    F m = f_set(0.f);
    for (int i = 0; i < reduction; i += 16) m = f_max(m, f_abs(f_load(row + i)));
    const float largest = f_hmax(m);
    const float inverse = largest > 1e-30f ? limit / largest : 0.f;
    to.scale[r] = largest / limit;
    const F factor = f_set(inverse);
    for (int g = 0; g < groups; ++g) {
      if (width % 16) {  // narrow groups of 2- and 4-bit codes
        float sum = 0.f, exact = 0.f;
        for (int i = g * width; i < (g + 1) * width; ++i) {
          const int16_t q = (int16_t)(int)round_even(row[i] * inverse);
          to.element[r * reduction + i] = q;
          sum += q;
          exact += row[i];
        }
        to.sum[r * groups + g] = sum;
        to.exact[r * groups + g] = exact;
        continue;
      }
      I sum = i_set(0);
      F exact = f_set(0.f);
      for (int i = g * width; i < (g + 1) * width; i += 16) {
        const F x = f_load(row + i);
        const I q = to_int(f_mul(x, factor));
        store_int16(to.element + r * reduction + i, q);
        sum = i_add(sum, q);
        exact = f_add(exact, x);
      }
      to.sum[r * groups + g] = (float)i_hsum(sum);
      to.exact[r * groups + g] = f_hsum(exact);
    }
  }
}

// What a tile does with its sums: out += lane_scale * ((sum - offset * row_sum) * row_scale + lane_zero * row_exact +
// row_extra).
struct Epilogue {
  const float* row_scale;   // [rows]
  const float* row_sum;     // [rows], step row_stride: int16 sums that take the codes' offset away
  const float* row_exact;   // [rows], step row_stride: sums that zero points of a group along the reduction multiply
  const float* row_extra;   // [rows] or null: terms of zero points folded into rows
  int row_stride;
  const uint8_t* lane_scale;  // float16 [lanes] or null
  const uint8_t* lane_zero;   // int16 [lanes] or null
};

template <int BITS, int R, int N>
inline void code_tile(const uint8_t* codes, const uint8_t* next, int step, int vectors, const int16_t* a, int a_stride,
                      const Epilogue& e, float* out, int out_stride) {
  constexpr int planes = 16 / BITS;
  const I mask = i_set(((1 << BITS) - 1) * 0x10001);
  I acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = i_set(0);
  for (int v = 0; v < vectors; ++v) {
    I x[N];
    for (int n = 0; n < N; ++n) {
      x[n] = i_load(codes + (int64_t)v * step + n * kVectorBytes);
      if (next) __builtin_prefetch(next + (int64_t)v * step + n * kVectorBytes, 0, 3);
    }
#pragma GCC unroll 8
    for (int p = 0; p < planes; ++p) {
      I u[N];
      for (int n = 0; n < N; ++n) {
        u[n] = i_and(x[n], mask);
        x[n] = i_shr<BITS>(x[n]);
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        memcpy(&pair, a + r * a_stride + (v * planes + p) * 2, 4);
        const I q = i_set(pair);
        for (int n = 0; n < N; ++n) acc[r][n] = i_dot(acc[r][n], q, u[n]);
      }
    }
  }
  for (int n = 0; n < N; ++n) {
    const F scale = e.lane_scale ? load_half(e.lane_scale + n * 32) : f_set(1.f);
    const F zero = e.lane_zero ? load_int16(e.lane_zero + n * 32) : f_set(0.f);
    for (int r = 0; r < R; ++r) {
      const float offset = (float)(1 << (BITS - 1)) * e.row_sum[r * e.row_stride];
      F y = f_mul(f_sub(to_float(acc[r][n]), f_set(offset)), f_set(e.row_scale[r]));
      if (e.lane_zero) y = f_fma(zero, f_set(e.row_exact[r * e.row_stride]), y);
      if (e.row_extra) y = f_add(y, f_set(e.row_extra[r]));
      float* to = out + (int64_t)r * out_stride + n * kLanes;
      f_store(to, f_fma(scale, y, f_load(to)));
    }
  }
}

// FLOAT_BITS 16: bfloat16 pairs as in a 16-bit block. 32: float rows [reduction][step / 4].
template <int BITS, int R, int N>
inline void float_tile(const uint8_t* x, const uint8_t* next, int step, int vectors, const float* a, int a_stride,
                       float* out, int out_stride) {
  F acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) acc[r][n] = f_load(out + (int64_t)r * out_stride + n * kLanes);
  for (int v = 0; v < vectors; ++v) {
    const uint8_t* from = x + (int64_t)v * step;
    if (next)
      for (int n = 0; n < N; ++n) __builtin_prefetch(next + (int64_t)v * step + n * kVectorBytes, 0, 3);
#pragma GCC unroll 2
    for (int h = 0; h < (BITS == 16 ? 2 : 1); ++h) {
      F u[N];
      for (int n = 0; n < N; ++n) {
        const I w = i_load(from + n * kVectorBytes);
        u[n] = as_float(BITS == 32 ? w : h ? i_and(w, i_set((int32_t)0xffff0000)) : i_shl<16>(w));
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const F q = f_set(a[r * a_stride + (BITS == 16 ? 2 * v + h : v)]);
        for (int n = 0; n < N; ++n) acc[r][n] = f_fma(q, u[n], acc[r][n]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) f_store(out + (int64_t)r * out_stride + n * kLanes, acc[r][n]);
}

// Calls tile.run<R, N>(row, vector) until `rows` x `vectors` are covered.
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
    const int left = rows - row, pieces = (left + kMaxRows - 1) / kMaxRows, now = (left + pieces - 1) / pieces;
    switch (now) {
      case 1: cover_vectors<1>(row, vectors, tile); break;
      case 2: cover_vectors<2>(row, vectors, tile); break;
      case 3: cover_vectors<3>(row, vectors, tile); break;
      case 4: cover_vectors<4>(row, vectors, tile); break;
      case 5: cover_vectors<5>(row, vectors, tile); break;
      default: cover_vectors<6>(row, vectors, tile); break;
    }
    row += now;
  }
}

template <int BITS>
struct CodeTile {
  const uint8_t *codes, *next;
  int step, vectors;
  const int16_t* a;
  int a_stride;
  Epilogue e;
  float* out;
  int out_stride;

  template <int R, int N>
  void run(int row, int n) const {
    Epilogue mine = e;
    mine.row_scale += row;
    mine.row_sum += row * e.row_stride;
    mine.row_exact += row * e.row_stride;
    if (mine.row_extra) mine.row_extra += row;
    if (mine.lane_scale) mine.lane_scale += n * 32;
    if (mine.lane_zero) mine.lane_zero += n * 32;
    code_tile<BITS, R, N>(codes + n * kVectorBytes, next && row == 0 ? next + n * kVectorBytes : nullptr, step, vectors,
                          a + (int64_t)row * a_stride, a_stride, mine, out + (int64_t)row * out_stride + n * kLanes,
                          out_stride);
  }
};

template <int BITS>
struct FloatTile {
  const uint8_t *x, *next;
  int step, vectors;
  const float* a;
  int a_stride;
  float* out;
  int out_stride;

  template <int R, int N>
  void run(int row, int n) const {
    float_tile<BITS, R, N>(x + n * kVectorBytes, next && row == 0 ? next + n * kVectorBytes : nullptr, step, vectors,
                           a + (int64_t)row * a_stride, a_stride, out + (int64_t)row * out_stride + n * kLanes,
                           out_stride);
  }
};
