// Attention over the full-precision tail of a sequence: residual window and the step's own tokens. Included once per
// body, after softmax.h.

inline void load_rows(Dtype dtype, const void* from, int64_t count, float* to) {
  if (dtype == Dtype::f32) {
    memcpy(to, from, count * 4);
  } else if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < count; i += 16) f_store(to + i, load_bf16((const uint16_t*)from + i));
  } else {
    for (int64_t i = 0; i < count; i += 16) f_store(to + i, load_half((const uint16_t*)from + i));
  }
}

template <Dtype D>
inline F load_row(const void* row, int i) {
  if constexpr (D == Dtype::f32) return f_load((const float*)row + i);
  if constexpr (D == Dtype::bf16) return load_bf16((const uint16_t*)row + i);
  return load_half((const uint16_t*)row + i);
}

// Rows of the tokens of a tile.
struct TileRows {
  const uint8_t *key[kTailTokens], *value[kTailTokens];
  int count;
  int lines;  // of a row

  explicit TileRows(const AttendCall& c, int count)
      : count(count), lines((c.head_dim * size_of(c.k_new.dtype) + kVectorBytes - 1) / kVectorBytes) {}
};

// The position of the first token of a unit behind the pages.
inline int64_t tail_begin(const AttendCall& c, const WorkItem& item, int64_t unit) {
  const int64_t packed_end = c.sequences[item.sequence].packed_end;
  return packed_end + (unit - packed_end / c.key.page) * kTailTokens;
}

// The rows of such a unit, as far as the item's queries see it.
inline TileRows tail_rows(const AttendCall& c, const WorkItem& item, int64_t unit) {
  const Sequence& s = c.sequences[item.sequence];
  const int64_t begin = tail_begin(c, item, unit), left = s.prior + item.token_end - begin;
  TileRows tile(c, (int)(left < kTailTokens ? left : kTailTokens));
  for (int t = 0; t < tile.count; ++t) {
    const bool fresh = s.is_fresh(begin + t);
    const int64_t row = s.row_of(begin + t, c.ring_length);
    tile.key[t] = (const uint8_t*)(fresh ? c.k_new : c.k_ring).at(row, item.kv_head);
    tile.value[t] = (const uint8_t*)(fresh ? c.v_new : c.v_ring).at(row, item.kv_head);
  }
  return tile;
}

inline TileRows sink_rows(const AttendCall& c, const WorkItem& item, int begin, int end) {
  const int64_t page = c.pages[c.sequences[item.sequence].page_begin];
  TileRows tile(c, end - begin);
  for (int t = begin; t < end; ++t) {
    tile.key[t - begin] = (const uint8_t*)c.k_sinks.at(page * c.sinks + t, item.kv_head);
    tile.value[t - begin] = (const uint8_t*)c.v_sinks.at(page * c.sinks + t, item.kv_head);
  }
  return tile;
}

// Above this many rows of queries a tile is turned, so that tokens are lanes; below, that would not pay.
constexpr int kFewRows = 8;

// Products with the key of token t, for the lanes to be added up. Its value and the key 16 tokens on are fetched.
template <Dtype D, int N>
inline void add_products(const TileRows& tile, int t, const float* q, int rows, int dim, F (*part)[kLanes]) {
  const int token = t < tile.count ? t : tile.count - 1;
  fetch_lines(tile.value[token], tile.lines);
  if (t + kLanes < tile.count) fetch_lines(tile.key[t + kLanes], tile.lines);
  for (int from = 0; from < dim; from += N * kLanes) {
    F k[N];
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) k[n] = load_row<D>(tile.key[token], from + n * kLanes);
    for (int r = 0; r < rows; ++r) {
      const float* row = q + r * dim + from;
      F sum = from ? f_fma(f_load(row), k[0], part[r][t % kLanes]) : f_mul(f_load(row), k[0]);
      KVTUNER_UNROLL for (int n = 1; n < N; ++n) sum = f_fma(f_load(row + n * kLanes), k[n], sum);
      part[r][t % kLanes] = sum;
    }
  }
}

template <Dtype D>
inline void scores_of_few(const TileRows& tile, const float* q, int rows, int dim, float* scores) {
  F part[kFewRows][kLanes];
  for (int from = 0; from < tile.count; from += kLanes) {
    for (int t = from; t < from + kLanes; ++t)
      dim % (4 * kLanes) ? add_products<D, 1>(tile, t, q, rows, dim, part)
                         : add_products<D, 4>(tile, t, q, rows, dim, part);
    for (int r = 0; r < rows; ++r) f_store(scores + r * kTailTokens + from, f_hsum_each(part[r]));
  }
}

// next: the tile whose keys are fetched meanwhile, or null.
template <Dtype D, int R, int N>
inline void add_values(const TileRows& tile, const float* p, int from, float* acc, int dim, const TileRows* next) {
  F sum[R][N];
  KVTUNER_UNROLL for (int r = 0; r < R; ++r) KVTUNER_UNROLL for (int n = 0; n < N; ++n) sum[r][n] =
      f_load(acc + r * dim + from + n * kLanes);
  for (int t = 0; t < tile.count; ++t) {
    if (next && t < next->count) fetch_lines(next->key[t], next->lines);
    F v[N];
    KVTUNER_UNROLL for (int n = 0; n < N; ++n) v[n] = load_row<D>(tile.value[t], from + n * kLanes);
    KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
      const F weight = f_set(p[r * kTailTokens + t]);
      KVTUNER_UNROLL for (int n = 0; n < N; ++n) sum[r][n] = f_fma(weight, v[n], sum[r][n]);
    }
  }
  KVTUNER_UNROLL for (int r = 0; r < R; ++r) KVTUNER_UNROLL for (int n = 0; n < N; ++n)
      f_store(acc + r * dim + from + n * kLanes, sum[r][n]);
}

template <Dtype D>
struct ValueTiles {
  const TileRows& tile;
  const float* p;
  float* acc;
  int dim;
  const TileRows* next;

  template <int R, int N>
  KVTUNER_INLINE void run(int row, int n) const {
    add_values<D, R, N>(tile, p + row * kTailTokens, n * kLanes, acc + row * dim, dim, row || n ? nullptr : next);
  }
};

// Probabilities of a tile, causal: a query sees the tokens up to its own.
inline void softmax_tile(const AttendCall& c, const WorkItem& item, State& state, int64_t begin, int count,
                         float* scores) {
  const Sequence& seq = c.sequences[item.sequence];
  Fetch none;
  for (int r = 0; r < state.rows; ++r) {
    float* row = scores + r * kTailTokens;
    const int64_t visible = seq.prior + item.token_begin + r / c.group + 1 - begin;
    const int limit = visible < count ? (int)visible : count;
    if (limit <= 0) {
      memset(row, 0, sizeof(float) * kTailTokens);
      continue;
    }
    for (int t = limit; t < kTailTokens; ++t) row[t] = -1e38f;
    softmax_row(state, r, row, kTailTokens, kTailTokens, none);
  }
}

template <Dtype D>
inline void attend_few(const AttendCall& c, const WorkItem& item, const float* q, State& state, const TileRows& tile,
                       int64_t begin, float* scores, const TileRows* next) {
  scores_of_few<D>(tile, q, state.rows, c.head_dim, scores);
  softmax_tile(c, item, state, begin, tile.count, scores);
  cover(state.rows, c.head_dim / kLanes, ValueTiles<D>{tile, scores, state.acc, c.head_dim, next});
}

struct TailScratch {
  float *scores, *rows, *keys, *values;
};

inline void attend_many(const AttendCall& c, const WorkItem& item, const float* q, State& state, const TileRows& tile,
                        int64_t begin, TailScratch& s) {
  const int rows = state.rows, dim = c.head_dim;
  for (int t = 0; t < tile.count; ++t) {
    load_rows(c.k_new.dtype, tile.key[t], dim, s.rows + t * dim);
    load_rows(c.v_new.dtype, tile.value[t], dim, s.values + t * dim);
  }
  memset(s.rows + tile.count * dim, 0, sizeof(float) * (kTailTokens - tile.count) * dim);
  for (int t = 0; t < kTailTokens; t += 16)
    for (int i = 0; i < dim; i += 16) transpose16(s.rows + t * dim + i, dim, s.keys + i * kTailTokens + t, kTailTokens);
  Fetch none;
  const uint8_t *key_rows = (const uint8_t*)s.keys, *value_rows = (const uint8_t*)s.values;
  const FloatProduct scores{&key_rows, 1, kTailTokens * 4, dim, q, dim, s.scores, kTailTokens, false};
  cover(rows, kTailTokens / kLanes, FloatTiles<32>{scores, none});
  softmax_tile(c, item, state, begin, tile.count, s.scores);
  const FloatProduct sums{&value_rows, 1, dim * 4, tile.count, s.scores, kTailTokens, state.acc, dim, true};
  cover(rows, dim / kLanes, FloatTiles<32>{sums, none});
}

// next: the tile that follows, or null.
inline void attend_tile(const AttendCall& c, const WorkItem& item, const float* q, State& state, const TileRows& tile,
                        int64_t begin, TailScratch& s, const TileRows* next) {
  if (state.rows > kFewRows) return attend_many(c, item, q, state, tile, begin, s);
  switch (c.k_new.dtype) {
    case Dtype::f32:
      return attend_few<Dtype::f32>(c, item, q, state, tile, begin, s.scores, next);
    case Dtype::bf16:
      return attend_few<Dtype::bf16>(c, item, q, state, tile, begin, s.scores, next);
    case Dtype::f16:
      return attend_few<Dtype::f16>(c, item, q, state, tile, begin, s.scores, next);
  }
}

// A first page's codes of sinks are not looked at ...
inline void hide_sinks(const AttendCall& c, float* scores, int rows, int stride) {
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < c.sinks; ++t) scores[r * stride + t] = -1e38f;
}

// ... but the rows that are kept beside it.
inline void attend_sinks(const AttendCall& c, const WorkItem& item, const float* q, State& state, TailScratch& s) {
  for (int begin = 0; begin < c.sinks; begin += kTailTokens) {
    const int end = c.sinks - begin < kTailTokens ? c.sinks : begin + kTailTokens;
    attend_tile(c, item, q, state, sink_rows(c, item, begin, end), begin, s, nullptr);
  }
}
