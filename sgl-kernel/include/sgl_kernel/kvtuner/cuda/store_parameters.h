// Arguments of the kernels that store a step.
#pragma once

#include <cstdint>

namespace kvtuner::cuda {

// Buffers and plan as in DecodeParameters; requests may have more than one row: those from query_start[request] on.
struct StoreParameters {
  const uint16_t *k, *v;
  int64_t k_stride, v_stride;
  uint8_t *k_pages, *v_pages;
  uint16_t *k_ring, *v_ring, *k_sinks, *v_sinks;
  const int64_t* slots;
  const int32_t *query_start, *prefix_lens, *pages;
  int64_t pages_stride;
  int64_t* nonfinite_blocks;  // blocks packed with an element that is NaN or infinite are added to it
  int kv_heads, ring_length, sink_length;
  int row_blocks;  // of store_rows_kernel, for each request
};

}  // namespace kvtuner::cuda
