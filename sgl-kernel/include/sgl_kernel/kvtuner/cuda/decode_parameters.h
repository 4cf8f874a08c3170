// Arguments of the kernels of decode attention.
#pragma once

#include <cstdint>

namespace kvtuner::cuda {

// Half-precision rows are in the model's dtype, bfloat16 or float16, and start at multiples of 16 bytes.
struct DecodeParameters {
  // The step, a row for every request: [kv_heads * group][head_dim] of q and out, [kv_heads][head_dim] of k and v.
  // Strides of rows in elements.
  const uint16_t *q, *k, *v;
  uint16_t* out;
  int64_t q_stride, k_stride, v_stride, out_stride;
  // The cache: [pages][kv_heads][block], [slots][ring_length][kv_heads][head_dim], [pages][sink_length][kv_heads][..].
  const uint8_t *k_pages, *v_pages;
  const uint16_t *k_ring, *v_ring, *k_sinks, *v_sinks;
  // The plan, for every request: its slot, tokens before the step (below 0: a padded request, whose rows are zeroed),
  // those of them in packed pages, and the ids of its pages.
  const int64_t* slots;
  const int32_t *prefix_lens, *packed_end, *pages;
  int64_t pages_stride;
  // Results of parts, [requests][kv_heads * head tiles][splits + 1][kHeadTile], of head_dim floats and one: each
  // divided by its own sum, and the logarithm of that sum to base 2. arrivals: [requests][kv_heads * head tiles], zero
  // before and after the launch; null leaves merging to a kernel of its own.
  float *part_out, *part_lse;
  int32_t* arrivals;
  int kv_heads, group, splits, ring_length, sink_length;
  float scaling;
};

}  // namespace kvtuner::cuda
