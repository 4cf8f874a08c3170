// One work item of attention: online softmax over runs of packed pages, then over full-precision tiles.
#pragma once

#include <sgl_kernel/kvtuner/cpu/attend_rows.h>
#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/block_multiply.h>
#include <sgl_kernel/kvtuner/cpu/hadamard.h>
#include <sgl_kernel/kvtuner/cpu/store_out.h>
#include <sgl_kernel/kvtuner/cpu/weights.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

// Pages whose scores are computed before their values are read: what a page waits for (maxima, roundings) is waited for
// once, and the sums of values leave the registers once. With many rows there is work enough in one. The blocks of a
// run, fetched ahead of use, must not push each other out of the first-level cache.
constexpr int kRunPages = 4;
constexpr int kRunRows = 16;
constexpr int kRunBytes = 36 << 10;

// The share of a block's lines that is fetched outside of tiles.
constexpr int kRestShare = 4;

inline int run_pages(const AttendCall& c, int rows) {
  const int fit = kRunBytes / (c.layer.key.format.block_bytes() + c.layer.value.format.block_bytes());
  return rows > kRunRows || fit < 1 ? 1 : fit < kRunPages ? fit : kRunPages;
}

struct Scratch {
  float *q, *page_q, *scores, *folded;  // page_q: rotated where packed keys are
  QuantizedRows keys, values;
  Parameters key_parameters, value_parameters;
  TileScratch tile;
  RunningSoftmax softmax;
  BlockShape key, value;
  int run;
  int64_t bytes;

  Scratch(const AttendCall& c, int rows, void* memory)
      : key(c.layer.key.format), value(c.layer.value.format), run(run_pages(c, rows)) {
    Carver carve{(char*)memory};
    const int dim = c.layer.head_dim, page = c.layer.page_size,
              tokens = page * run > kTileTokens ? page * run : kTileTokens;
    q = carve.take<float>(rows * dim);
    page_q = c.layer.key.format.hadamard ? carve.take<float>(rows * dim) : q;
    scores = carve.take<float>(rows * tokens);
    folded = carve.take<float>(2 * kLanes * spare_length(run * page));
    keys = keys_once() ? QuantizedRows::carve(carve, key, rows, 1, dim)
                       : QuantizedRows::carve(carve, key, rows, run * key.groups, dim);
    values = value.lane_groups() ? QuantizedRows::carve(carve, value, rows, value.groups, run * page)
                                 : QuantizedRows::carve(carve, value, rows, value.nbits == 16 ? 0 : run, page);
    key_parameters = Parameters::carve(carve, key, run);
    value_parameters = Parameters::carve(carve, value, run);
    tile = {scores, carve.take<float>(kTileTokens * dim), carve.take<float>(kTileTokens * dim),
            carve.take<float>(kTileTokens * dim)};
    softmax = {rows, dim, carve.take<float>(rows * dim), carve.take<float>(rows), carve.take<float>(rows * kLanes)};
    bytes = carve.used;
  }

  // Queries serve every page as they are.
  bool keys_once() const { return !key.lane_groups(); }

 private:
  int spare_length(int tokens) const {
    const int for_values = value.lane_groups() && value.groups > 1 ? tokens : 0;
    return for_values > key.reduction ? for_values : key.reduction;
  }
};

// What an item of the call needs at most.
int64_t scratch_bytes(const AttendCall& c) {
  const int most = (int)row_limit(c.group), few = most < kRunRows ? most : kRunRows;
  const int64_t a = Scratch(c, most, nullptr).bytes, b = Scratch(c, few, nullptr).bytes;
  return a > b ? a : b;
}

inline void load_queries(const AttendCall& c, const WorkItem& item, Scratch& s) {
  const int rows = s.softmax.rows, dim = c.layer.head_dim;
  const F factor = f_set(c.scaling * 1.44269504f);  // scores in units of log 2
  for (int r = 0; r < rows; ++r) {
    const int64_t row = c.requests[item.request].first_row + item.token_begin + r / c.group;
    float* q = s.q + r * dim;
    load_rows(c.q.dtype, c.q.at(row, item.kv_head * c.group + r % c.group), dim, q);
    for (int i = 0; i < dim; i += 16) f_store(q + i, f_mul(f_load(q + i), factor));
    s.softmax.running_max[r] = kNothing;
  }
  memset(s.softmax.running_sum, 0, sizeof(float) * rows * kLanes);
  memset(s.softmax.result, 0, sizeof(float) * rows * dim);
}

// after: what follows the pages, which is fetched with the last ones.
inline void attend_pages(const AttendCall& c, const WorkItem& item, Scratch& s, int64_t last, const TileRows& after) {
  if (item.unit_begin >= last) return;
  const int rows = s.softmax.rows, dim = c.layer.head_dim, page = c.layer.page_size, stride = s.run * page;
  const int32_t* pages = c.requests[item.request].pages;
  const auto block_of = [&](const uint8_t* blocks, const BlockShape& f, int64_t u) {
    return blocks + ((int64_t)pages[u] * c.layer.kv_heads + item.kv_head) * f.bytes;
  };
  for (int64_t u = item.unit_begin; u < last && u < item.unit_begin + s.run; ++u)
    fetch_lines(block_of(c.layer.key.pages, s.key, u), s.key.lines());
  if (c.layer.key.format.hadamard) {
    memcpy(s.page_q, s.q, sizeof(float) * rows * dim);
    for (int r = 0; r < rows; ++r) rotate_row(s.page_q + r * dim, dim, c.layer.key.format.hadamard, s.folded);
  }
  if (s.keys_once()) prepare(s.key, nullptr, 1, s.page_q, dim, rows, s.key_parameters, s.folded, s.keys);
  for (int64_t u = item.unit_begin; u < last; u += s.run) {
    const int count = (int)(last - u < s.run ? last - u : s.run);
    const int next = (int)(last - u - count < s.run ? last - u - count : s.run);
    const uint8_t *keys[kRunPages], *values[kRunPages], *next_keys[kRunPages];
    for (int j = 0; j < count; ++j) {
      keys[j] = block_of(c.layer.key.pages, s.key, u + j);
      values[j] = block_of(c.layer.value.pages, s.value, u + j);
      // Parameters come last in a block, and are needed first.
      fetch_lines(values[j] + s.value.code_lines() * kVectorBytes, s.value.lines() - s.value.code_lines());
    }
    for (int j = 0; j < next; ++j) next_keys[j] = block_of(c.layer.key.pages, s.key, u + count + j);
    Fetch fetch_values(values, count, s.value.code_lines()), fetch_keys(next_keys, next, s.key.lines());
    if (next == 0 && rows <= kFewRows) fetch_keys = Fetch(after.key, after.count, after.lines);

    const QuantizedRows queries = s.keys_once() ? s.keys : s.keys.shaped(count * s.key.groups, dim);
    if (!s.keys_once()) prepare(s.key, keys, count, s.page_q, dim, rows, s.key_parameters, s.folded, queries);
    fetch_values.pace(fetch_values.left() - fetch_values.left() / kRestShare, count * s.key.steps(rows));
    for (int j = 0; j < count; ++j)
      multiply(s.key, keys + j, 1, s.page_q, dim, queries, s.keys_once() ? 0 : j * s.key.groups, rows,
               s.scores + j * page, stride, false, fetch_values);
    if (u == 0) hide_sinks(c, s.scores, rows, stride);

    const QuantizedRows weights =
        s.value.lane_groups() ? s.values.shaped(s.value.groups, count * page) : s.values.shaped(count, page);
    fetch_values.pace(fetch_values.left(), soon_steps(rows, count));
    fetch_keys.pace(fetch_keys.left() / kRestShare, later_steps(s.value, rows));
    weigh(s.softmax, s.value, values, count, s.scores, stride, s.value_parameters, s.folded, weights, fetch_values,
          fetch_keys);

    fetch_keys.pace(fetch_keys.left(), count * s.value.steps(rows));
    multiply(s.value, values, count, s.scores, stride, weights, 0, rows, s.softmax.result, dim, true, fetch_keys);
  }
}

inline void store_result(const AttendCall& c, const WorkItem& item, const RunningSoftmax& softmax) {
  if (item.partial) {
    float* to = item.partial;
    memcpy(to, softmax.result, sizeof(float) * softmax.rows * softmax.head_dim);
    memcpy(to + (int64_t)softmax.rows * softmax.head_dim, softmax.running_max, sizeof(float) * softmax.rows);
    for (int r = 0; r < softmax.rows; ++r) to[(int64_t)softmax.rows * (softmax.head_dim + 1) + r] = softmax.sum(r);
    return;
  }
  const RequestStep& request = c.requests[item.request];
  for (int r = 0; r < softmax.rows; ++r) {
    const int64_t row = request.first_row + item.token_begin + r / c.group, head = item.kv_head * c.group + r % c.group;
    store_out(c, row, head, softmax.result + (int64_t)r * softmax.head_dim, 1.f / softmax.sum(r));
  }
}

void attend(const AttendCall& c, const WorkItem& item, void* memory) {
  Scratch s(c, (int)(item.token_end - item.token_begin) * c.group, memory);
  load_queries(c, item, s);
  const int64_t packed = c.requests[item.request].packed_end / c.layer.page_size;
  int64_t u = item.unit_begin > packed ? item.unit_begin : packed;
  const TileRows none(c, 0);
  TileRows tile = u < item.unit_end ? tile_rows(c, item, u) : none;
  attend_pages(c, item, s, item.unit_end < packed ? item.unit_end : packed, tile);
  if (item.unit_begin == 0 && packed > 0) attend_sinks(c, item, s.q, s.softmax, s.tile);
  for (; u < item.unit_end; ++u) {
    const TileRows next = u + 1 < item.unit_end ? tile_rows(c, item, u + 1) : none;
    attend_tile(c, item, s.q, s.softmax, tile, tile_begin(c, item, u), s.tile, &next);
    tile = next;
  }
  store_result(c, item, s.softmax);
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
