// What attention over the packed cache is given, in plain C++: shared by the launcher and the bodies.
#pragma once

#include <cstdint>

#include "../kv_codec.h"

namespace kvtuner {

enum class Dtype : int { f32, f16, bf16 };

inline int64_t size_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }

// Full-precision K or V rows: element (row, head, channel) is at row * row_stride + head * head_stride + channel.
struct RowSource {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
  Dtype dtype;

  const char* at(int64_t row, int64_t head) const {
    return (const char*)data + (row * row_stride + head * head_stride) * size_of(dtype);
  }
};

// One sequence of a step, as the rows of the plan hold it (steps.py, BatchPlan).
struct Sequence {
  int64_t slot;        // ring
  int64_t first;       // its first row in q, new keys and values, and out
  int64_t fresh;       // rows of the step
  int64_t prior;       // tokens before the step
  int64_t packed_end;  // tokens read from pages
  int64_t page_begin;  // its first entry in the page list

  bool is_fresh(int64_t position) const { return position >= prior; }
  // The row of a token that is not read from pages: among the new ones where it is fresh, else among the rings'.
  int64_t row_of(int64_t position, int64_t ring_length) const {
    return is_fresh(position) ? first + position - prior : slot * ring_length + position % ring_length;
  }
};

// rings have slot * ring_slot_rows + position % ring_length as row.
struct AttendCall {
  RowSource q, k_new, v_new, k_ring, v_ring;
  void* out;
  int64_t out_row_stride, out_head_stride;
  const uint8_t *k_pages, *v_pages;
  BlockFormat key, value;
  const Sequence* sequences;
  const int32_t* pages;
  int64_t ring_length;
  int kv_heads, group, head_dim;
  float scaling;
  // Full-precision rows of the first `sinks` tokens of a sequence, which hide those of its first page: row
  // page id * sinks + position.
  RowSource k_sinks, v_sinks;
  int sinks;
};

constexpr int kTailTokens = 64;

// A share of the work: some queries of one sequence and KV head, over some units of its keys. Units are pages of the
// packed prefix, then tiles of kTailTokens of what follows. partial: where to leave an unfinished result, or null.
struct WorkItem {
  int sequence, kv_head;
  int64_t token_begin, token_end;
  int64_t unit_begin, unit_end;
  float* partial;  // [rows][head_dim], then [rows] maxima and [rows] sums
};

struct Body {
  const char* name;
  bool (*supported)();
  int64_t (*scratch_bytes)(const AttendCall&);
  void (*attend)(const AttendCall&, const WorkItem&, void* scratch);
  // rows [page][head_dim] of floats, which may be overwritten, to a block; codes: scratch of page * head_dim bytes.
  void (*pack)(const BlockFormat&, float* rows, uint8_t* block, uint8_t* codes);
  void (*load_rows)(Dtype, const void* from, int64_t count, float* to);
};

extern const Body kAvx512Body, kAvx2Body, kPlainBody;

inline int64_t units_of(const Sequence& s, int64_t token_end, int page) {
  return s.packed_end / page + (s.prior + token_end - s.packed_end + kTailTokens - 1) / kTailTokens;
}

// Queries of one item: as many tokens as give about 96 rows, so that a tile turned or unpacked serves many of them.
constexpr int kItemRows = 96;

inline int64_t tokens_per_item(int group) { return group >= kItemRows ? 1 : kItemRows / group; }

inline int64_t row_limit(int group) { return group * tokens_per_item(group); }

// Cuts one allocation into arrays that start at cache lines.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = (T*)(base + used);
    used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

inline int64_t partial_floats(int64_t rows, int head_dim) { return rows * (head_dim + 2); }

}  // namespace kvtuner
