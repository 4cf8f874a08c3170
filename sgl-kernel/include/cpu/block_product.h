// Tiles of out[rows][lanes] (+)= a[rows][reduction] * x[reduction][lanes], x in a packed block that is never
// dequantized. Included once per body, in its namespace, after a simd_*.h.
//
// Rows of `a` are int16 with a scale of their own (relative error about 2^-16, where int8 would cost 1e-2 and bfloat16
// 4e-3); products with codes accumulate exactly in int32.

// Loops over accumulators must be unrolled for them to stay in registers.
#define KVTUNER_UNROLL _Pragma("GCC unroll 16")

// A tile is a function of its own; what chooses it is not, since structs that are copied on the way cost a third of a tile.
#define KVTUNER_INLINE __attribute__((always_inline)) inline
#define KVTUNER_TILE __attribute__((noinline))

// Lines of a block that is read later. A core waits for some two dozen lines at a time and stands still when more are
// asked for: they have to be fetched in even steps, in all that is done meanwhile.
struct Prefetch {
  const uint8_t* at;
  int lines;  // per step of a tile
  int more;   // steps with one more

  void fetch(int count) {
    for (int i = 0; i < count; ++i, at += kVectorBytes) __builtin_prefetch(at, 0, 3);
  }
  void step() { fetch(lines + (more-- > 0)); }
};

// What tiles leave of some blocks: the lines from `begin` to `end` of each, in at most `steps` steps.
struct PrefetchRest {
  const uint8_t* const* block;
  int blocks, begin, end, line, lines;

  PrefetchRest() : blocks(0) {}
  PrefetchRest(const uint8_t* const* block, int blocks, int begin, int end, int steps)
      : block(block), blocks(begin < end ? blocks : 0), begin(begin), end(end), line(begin),
        lines(steps ? ((end - begin) * blocks + steps - 1) / steps : 0) {}

  void step() {
    for (int i = 0; i < lines && blocks; ++i) {
      __builtin_prefetch(*block + line * kVectorBytes, 0, 3);
      if (++line < end) continue;
      line = begin;
      ++block;
      --blocks;
    }
  }
};

// What a tile does with its sums. Scales along the lanes: lane_scale * (row_scale * (sum - offset) + lane_zero *
// row_exact). Else: row_scale * sum + row_extra, the offset being a part of row_extra.
struct Epilogue {
  const float* row_scale;     // [rows]
  const float* row_extra;     // [rows]
  const int32_t* row_sum;     // [rows], step row_stride: sums of the int16, which take the codes' offset away
  const float* row_exact;     // [rows], step row_stride: sums of the floats
  int row_stride;
  const uint8_t* lane_scale;  // float16 [lanes]
  const uint8_t* lane_zero;   // int16 [lanes] or null
  bool accumulate;            // add to out, or replace it
};

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f(Constant<0>) to f(Constant<COUNT - 1>).
template <int COUNT, class Function>
KVTUNER_INLINE void each_plane(const Function& f) {
  if constexpr (COUNT > 1) each_plane<COUNT - 1>(f);
  f(Constant<COUNT - 1>{});
}

template <int BITS, bool LANE_SCALES, int R, int N>
KVTUNER_TILE void code_tile(const uint8_t* codes, int step, int vectors, const int16_t* a, int a_stride, const Epilogue& e,
                            float* out, int out_stride, Prefetch& later) {
  Prefetch fetch = later;
  constexpr int planes = 16 / BITS;
  const I mask = i_set(((1 << BITS) - 1) * 0x10001);
  I acc[R][N];
  KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
    const I start = i_set(LANE_SCALES ? -(1 << (BITS - 1)) * e.row_sum[r * e.row_stride] : 0);
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) acc[r][n] = start;
  }
  for (int v = 0; v < vectors; ++v) {
    fetch.step();
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
  later = fetch;
  const auto finish = [&](auto zeros, auto accumulate) {
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
      const F scale = LANE_SCALES ? load_half(e.lane_scale + n * 32) : f_set(1.f);
      const F zero = zeros.value ? load_int16(e.lane_zero + n * 32) : f_set(0.f);
      KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
        float* to = out + (int64_t)r * out_stride + n * kLanes;
        const F sum = to_float(acc[r][n]), row_scale = f_set(e.row_scale[r]);
        if constexpr (LANE_SCALES) {
          F y = f_mul(sum, row_scale);
          if (zeros.value) y = f_fma(zero, f_set(e.row_exact[r * e.row_stride]), y);
          f_store(to, accumulate.value ? f_fma(scale, y, f_load(to)) : f_mul(scale, y));
        } else {
          const F y = f_fma(sum, row_scale, f_set(e.row_extra[r]));
          f_store(to, accumulate.value ? f_add(y, f_load(to)) : y);
        }
      }
    }
  };
  using No = Constant<0>;
  using Yes = Constant<1>;
  if (LANE_SCALES && e.lane_zero)
    e.accumulate ? finish(Yes{}, Yes{}) : finish(Yes{}, No{});
  else
    e.accumulate ? finish(No{}, Yes{}) : finish(No{}, No{});
}

// BITS 16: bfloat16 pairs as in a 16-bit block. 32: float rows [reduction][step / 4].
template <int BITS, int R, int N>
KVTUNER_TILE void float_tile(const uint8_t* x, int step, int vectors, const float* a, int a_stride, float* out,
                             int out_stride, bool accumulate, Prefetch& later) {
  Prefetch fetch = later;
  F acc[R][N];
  KVTUNER_UNROLL for (int r = 0; r < R; ++r)
    KVTUNER_UNROLL for (int n = 0; n < N; ++n)
      acc[r][n] = accumulate ? f_load(out + (int64_t)r * out_stride + n * kLanes) : f_set(0.f);
  for (int v = 0; v < vectors; ++v) {
    fetch.step();
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
  later = fetch;
  KVTUNER_UNROLL for (int r = 0; r < R; ++r)
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) f_store(out + (int64_t)r * out_stride + n * kLanes, acc[r][n]);
}

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
    // Tiles of about the same height.
    const int left = rows - row, tiles = (left + kMaxRows - 1) / kMaxRows, now = (left + tiles - 1) / tiles;
    switch (now) {
      case 1: cover_vectors<1>(row, vectors, tile); break;
      case 2: cover_vectors<2>(row, vectors, tile); break;
      case 3: cover_vectors<3>(row, vectors, tile); break;
      case 4: cover_vectors<4>(row, vectors, tile); break;
      default: if constexpr (kMaxRows > 4) cover_vectors<5>(row, vectors, tile);
    }
    row += now;
  }
}

template <int BITS, bool LANE_SCALES>
struct CodeTile {
  const uint8_t* codes;
  int step, vectors;
  const int16_t* a;
  int a_stride;
  Epilogue e;
  float* out;
  int out_stride;
  Prefetch& later;

  template <int R, int N>
  KVTUNER_INLINE void run(int row, int n) const {
    const Epilogue mine{e.row_scale + row,
                        LANE_SCALES ? nullptr : e.row_extra + row,
                        LANE_SCALES ? e.row_sum + row * e.row_stride : nullptr,
                        LANE_SCALES ? e.row_exact + row * e.row_stride : nullptr,
                        e.row_stride,
                        LANE_SCALES ? e.lane_scale + n * 32 : nullptr,
                        LANE_SCALES && e.lane_zero ? e.lane_zero + n * 32 : nullptr,
                        e.accumulate};
    code_tile<BITS, LANE_SCALES, R, N>(codes + n * kVectorBytes, step, vectors, a + (int64_t)row * a_stride, a_stride, mine,
                                       out + (int64_t)row * out_stride + n * kLanes, out_stride, later);
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
  Prefetch& later;

  template <int R, int N>
  KVTUNER_INLINE void run(int row, int n) const {
    float_tile<BITS, R, N>(x + n * kVectorBytes, step, vectors, a + (int64_t)row * a_stride, a_stride,
                           out + (int64_t)row * out_stride + n * kLanes, out_stride, accumulate, later);
  }
};
