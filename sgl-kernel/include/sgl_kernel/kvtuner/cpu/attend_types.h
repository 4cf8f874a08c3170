// What attention over the packed cache is given, in plain C++: shared by the launcher and the bodies.
//
// A body is compiled for an instruction set; what is shared is not. So that no machine runs code for another one, a
// body includes every shared header before it sets its target (see csrc/kvtuner/cpu/body_*.cpp).
#pragma once

#include <cstdint>
#include <cstring>

#include <sgl_kernel/kvtuner/kv_codec.h>

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

// Buffers of K or of V in one layer. Position p of the request in a slot has the ring's row slot * ring_length + p %
// ring_length; the sinks have row page id * sink_length + position.
struct TensorBuffers {
  BlockFormat format;
  uint8_t* pages;  // [pages][kv_heads][block_bytes]
  RowSource ring, sinks;
};

struct LayerBuffers {
  TensorBuffers key, value;
  int kv_heads, head_dim, page_size, sink_length;
  int64_t ring_length, num_slots, num_pages;
  int64_t* nonfinite_blocks;  // blocks packed with an element that is NaN or infinite are added to it

  Dtype dtype() const { return key.ring.dtype; }
};

// One request in a step: rows [first_row, first_row + query_len) of the batch, after prefix_len tokens, of which those
// before packed_end are read from pages.
struct RequestStep {
  int64_t slot, first_row, query_len, prefix_len, packed_end;
  const int32_t* pages;  // ids of all its whole pages

  int64_t end() const { return prefix_len + query_len; }
  bool is_query(int64_t position) const { return position >= prefix_len; }
  // The row of a token that is not read from pages: among the step's own where it is a query's, else among the rings'.
  int64_t row_of(int64_t position, int64_t ring_length) const {
    return is_query(position) ? first_row + position - prefix_len : slot * ring_length + position % ring_length;
  }
};

struct AttendCall {
  const LayerBuffers& layer;
  const RequestStep* requests;
  RowSource q, k, v;  // the step's own
  void* out;
  int64_t out_row_stride, out_head_stride;
  int group;  // query heads of a KV head
  float scaling;
};

// Tokens of a tile of full-precision rows.
constexpr int kTileTokens = 64;

// A share of the work: some queries of one request and KV head, over some units of its keys. Units are pages of the
// packed prefix, then tiles of kTileTokens of what follows. partial: where to leave an unfinished result, or null.
struct WorkItem {
  int request, kv_head;
  int64_t token_begin, token_end;
  int64_t unit_begin, unit_end;
  float* partial;  // [rows][head_dim], then [rows] running maxima and [rows] running sums
};

struct Body {
  const char* name;
  bool (*supported)();
  int64_t (*scratch_bytes)(const AttendCall&);
  void (*attend)(const AttendCall&, const WorkItem&, void* scratch);
  // rows [page_size][head_dim] of floats, which may be overwritten, to a block; codes: scratch of page_size * head_dim
  // bytes. Whether all that was packed is finite.
  bool (*pack_page)(const BlockFormat&, float* rows, uint8_t* block, uint8_t* codes);
  void (*load_rows)(Dtype, const void* from, int64_t count, float* to);
};

extern const Body kAvx512Body, kAvx2Body, kPlainBody;

inline int64_t units_of(const RequestStep& s, int64_t token_end, int page_size) {
  return s.packed_end / page_size + (s.prefix_len + token_end - s.packed_end + kTileTokens - 1) / kTileTokens;
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
