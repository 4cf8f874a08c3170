// Attention over full-precision rows: the ring of the residual window, the step's own tokens, and sinks.
#pragma once

#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/block_product.h>
#include <sgl_kernel/kvtuner/cpu/softmax.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

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
  const uint8_t *key[kTileTokens], *value[kTileTokens];
  int count;
  int lines;  // of a row

  explicit TileRows(const AttendCall& c, int count)
      : count(count), lines((c.layer.head_dim * size_of(c.layer.dtype()) + kVectorBytes - 1) / kVectorBytes) {}
};

// The position of the first token of a unit behind the pages.
inline int64_t tile_begin(const AttendCall& c, const WorkItem& item, int64_t unit) {
  const int64_t packed_end = c.requests[item.request].packed_end;
  return packed_end + (unit - packed_end / c.layer.page_size) * kTileTokens;
}

// The rows of such a unit, as far as the item's queries see it.
inline TileRows tile_rows(const AttendCall& c, const WorkItem& item, int64_t unit) {
  const RequestStep& s = c.requests[item.request];
  const int64_t begin = tile_begin(c, item, unit), visible = s.prefix_len + item.token_end - begin;
  TileRows tile(c, (int)(visible < kTileTokens ? visible : kTileTokens));
  for (int t = 0; t < tile.count; ++t) {
    const bool is_query = s.is_query(begin + t);
    const int64_t row = s.row_of(begin + t, c.layer.ring_length);
    tile.key[t] = (const uint8_t*)(is_query ? c.k : c.layer.key.ring).at(row, item.kv_head);
    tile.value[t] = (const uint8_t*)(is_query ? c.v : c.layer.value.ring).at(row, item.kv_head);
  }
  return tile;
}

inline TileRows sink_rows(const AttendCall& c, const WorkItem& item, int begin, int end) {
  const int64_t page = c.requests[item.request].pages[0];
  TileRows tile(c, end - begin);
  for (int t = begin; t < end; ++t) {
    tile.key[t - begin] = (const uint8_t*)c.layer.key.sinks.at(page * c.layer.sink_length + t, item.kv_head);
    tile.value[t - begin] = (const uint8_t*)c.layer.value.sinks.at(page * c.layer.sink_length + t, item.kv_head);
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
    for (int r = 0; r < rows; ++r) f_store(scores + r * kTileTokens + from, f_hsum_each(part[r]));
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
      const F weight = f_set(p[r * kTileTokens + t]);
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
    add_values<D, R, N>(tile, p + row * kTileTokens, n * kLanes, acc + row * dim, dim, row || n ? nullptr : next);
  }
};

// Probabilities of a tile, causal: a query sees the tokens up to its own.
inline void softmax_tile(const AttendCall& c, const WorkItem& item, RunningSoftmax& softmax, int64_t begin, int count,
                         float* scores) {
  const RequestStep& request = c.requests[item.request];
  Fetch none;
  for (int r = 0; r < softmax.rows; ++r) {
    float* row = scores + r * kTileTokens;
    const int64_t visible = request.prefix_len + item.token_begin + r / c.group + 1 - begin;
    const int limit = visible < count ? (int)visible : count;
    if (limit <= 0) {
      memset(row, 0, sizeof(float) * kTileTokens);
      continue;
    }
    for (int t = limit; t < kTileTokens; ++t) row[t] = -1e38f;
    softmax_row(softmax, r, row, kTileTokens, kTileTokens, none);
  }
}

template <Dtype D>
inline void attend_few(const AttendCall& c, const WorkItem& item, const float* q, RunningSoftmax& softmax,
                       const TileRows& tile, int64_t begin, float* scores, const TileRows* next) {
  scores_of_few<D>(tile, q, softmax.rows, c.layer.head_dim, scores);
  softmax_tile(c, item, softmax, begin, tile.count, scores);
  cover(softmax.rows, c.layer.head_dim / kLanes, ValueTiles<D>{tile, scores, softmax.result, c.layer.head_dim, next});
}

struct TileScratch {
  float *scores, *rows, *keys, *values;
};

inline void attend_many(const AttendCall& c, const WorkItem& item, const float* q, RunningSoftmax& softmax,
                        const TileRows& tile, int64_t begin, TileScratch& s) {
  const int rows = softmax.rows, dim = c.layer.head_dim;
  for (int t = 0; t < tile.count; ++t) {
    load_rows(c.layer.dtype(), tile.key[t], dim, s.rows + t * dim);
    load_rows(c.layer.dtype(), tile.value[t], dim, s.values + t * dim);
  }
  memset(s.rows + tile.count * dim, 0, sizeof(float) * (kTileTokens - tile.count) * dim);
  for (int t = 0; t < kTileTokens; t += 16)
    for (int i = 0; i < dim; i += 16) transpose16(s.rows + t * dim + i, dim, s.keys + i * kTileTokens + t, kTileTokens);
  Fetch none;
  const uint8_t *key_rows = (const uint8_t*)s.keys, *value_rows = (const uint8_t*)s.values;
  const FloatProduct scores{&key_rows, 1, kTileTokens * 4, dim, q, dim, s.scores, kTileTokens, false};
  cover(rows, kTileTokens / kLanes, FloatTiles<32>{scores, none});
  softmax_tile(c, item, softmax, begin, tile.count, s.scores);
  const FloatProduct sums{&value_rows, 1, dim * 4, tile.count, s.scores, kTileTokens, softmax.result, dim, true};
  cover(rows, dim / kLanes, FloatTiles<32>{sums, none});
}

// next: the tile that follows, or null.
inline void attend_tile(const AttendCall& c, const WorkItem& item, const float* q, RunningSoftmax& softmax,
                        const TileRows& tile, int64_t begin, TileScratch& s, const TileRows* next) {
  if (softmax.rows > kFewRows) return attend_many(c, item, q, softmax, tile, begin, s);
  switch (c.layer.dtype()) {
    case Dtype::f32:
      return attend_few<Dtype::f32>(c, item, q, softmax, tile, begin, s.scores, next);
    case Dtype::bf16:
      return attend_few<Dtype::bf16>(c, item, q, softmax, tile, begin, s.scores, next);
    case Dtype::f16:
      return attend_few<Dtype::f16>(c, item, q, softmax, tile, begin, s.scores, next);
  }
}

// A first page's codes of sinks are not looked at ...
inline void hide_sinks(const AttendCall& c, float* scores, int rows, int stride) {
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < c.layer.sink_length; ++t) scores[r * stride + t] = -1e38f;
}

// ... but the rows that are kept beside it.
inline void attend_sinks(const AttendCall& c, const WorkItem& item, const float* q, RunningSoftmax& softmax,
                         TileScratch& s) {
  for (int begin = 0; begin < c.layer.sink_length; begin += kTileTokens) {
    const int end = c.layer.sink_length - begin < kTileTokens ? c.layer.sink_length : begin + kTileTokens;
    attend_tile(c, item, q, softmax, sink_rows(c, item, begin, end), begin, s, nullptr);
  }
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
