// Decode attention over the packed cache: split-KV over packed pages, and one more split over what is in full
// precision, in one launch.
//
// A warp owns whole pages and its own shared memory, one buffer for keys and one for values: while it multiplies the
// keys of a page its values arrive, while it multiplies the values the next page's keys arrive. There is no barrier of
// the block in that loop. What a launch does depends on the plan in device memory alone, so that CUDA graphs can hold
// it.
#pragma once

#include <sgl_kernel/kvtuner/cuda/full_rows.h>
#include <sgl_kernel/kvtuner/cuda/key_product.h>
#include <sgl_kernel/kvtuner/cuda/merge.h>
#include <sgl_kernel/kvtuner/cuda/page_copy.h>
#include <sgl_kernel/kvtuner/cuda/value_product.h>

namespace kvtuner::cuda {

constexpr float kLog2E = 1.44269504f;

// Pages [begin, end) of the request, every `warps`th of them by this warp.
template <class F>
KVTUNER_DEVICE void attend_pages(const DecodeParameters& p, const Place& place, int begin, int end, uint8_t* shared,
                                 Accumulator<F>& to) {
  constexpr BlockFormat key = F::key, value = F::value;
  const int warp = thread_index() / kWarpLanes, lane = thread_index() % kWarpLanes, g = lane / 4;
  uint8_t* keys = shared + warp * F::warp_bytes;
  uint8_t* values = keys + F::key_bytes;
  uint8_t* weights = values + F::value_bytes;
  const int32_t* ids = p.pages + place.request * p.pages_stride;
  const auto block_of = [&](int page) { return (int64_t)ids[page] * p.kv_heads + place.kv_head; };
  const auto fetch_keys = [&](int page) {
    if (page < end)
      copy_block<kPageTokens * kWordBytes, key.code_bytes(), F::key_bytes>(
          keys, p.k_pages + block_of(page) * F::key_bytes, lane);
    copy_commit();
  };
  const auto fetch_values = [&](int page) {
    if (page < end)
      copy_block<F::head_dim * kWordBytes, value.code_bytes(), F::value_bytes>(
          values, p.v_pages + block_of(page) * F::value_bytes, lane);
    copy_commit();
  };
  int page = begin + warp;
  fetch_keys(page), fetch_values(page);

  Queries<F> queries;
  const uint16_t* rows = p.q + place.request * p.q_stride + place.out;
  const float scale_log2 = p.scaling * kLog2E;
  if constexpr (key.hadamard != 0) {
    float* rotated = (float*)(shared + F::warps * F::warp_bytes);
    rotate_queries<F>(rows, place.heads, rotated);
    queries.load_rotated(rotated + g * F::head_dim, scale_log2, lane);
  } else {
    queries.load(rows + g * F::head_dim, g < place.heads, scale_log2, lane);
  }
  KeyProduct<F> product;
  product.prepare(queries);

  for (; page < end; page += F::warps) {
    PageLogits s;
    copy_wait<1>();
    sync_warp();
    product.multiply(queries, keys, lane, s);
    if (page == 0 && p.sink_length > 0) {  // the first tokens are read as full rows
      KVTUNER_UNROLL
      for (int i = 0; i < 4; ++i) KVTUNER_UNROLL
      for (int j = 0; j < 4; ++j)
        if (i / 2 * 32 + 4 * g + i % 2 * 2 + j / 2 < p.sink_length) s[i][j] = -INFINITY;
    }
    sync_warp();
    fetch_keys(page + F::warps);
    copy_wait<1>();
    sync_warp();
    ValueProduct<F>::add(s, queries.logit_scale, values, weights, lane, to);
    sync_warp();
    fetch_values(page + F::warps);
  }
  copy_wait<0>();
}

template <class F>
KVTUNER_DEVICE void attend_full_rows(const DecodeParameters& p, const Place& place, const FullRows& rows,
                                     uint8_t* shared, Accumulator<F>& to) {
  const int warp = thread_index() / kWarpLanes, lane = thread_index() % kWarpLanes, g = lane / 4, count = rows.count();
  RowProduct<F> product;
  product.load_queries(p.q + place.request * p.q_stride + place.out + g * F::head_dim, g < place.heads, lane);
  for (int first = warp * kRowTile; first < count; first += F::warps * kRowTile)
    product.add(rows, first, count, p.scaling * kLog2E, shared + warp * F::warp_bytes, lane, to);
}

// Grid (splits + 1, kv_heads * head tiles, requests), F::threads, F::shared_bytes.
template <class F>
KVTUNER_KERNEL(F::threads, F::blocks_per_sm)
decode_kernel(const DecodeParameters p) {
  static_assert(F::supported(), "this format is another kernel's");
  static_assert(F::key_bytes % 16 == 0 && F::value_bytes % 16 == 0, "blocks are copied in 16-byte pieces");
  KVTUNER_SHARED(shared);
  const int part = block_index().x;
  const Place place(p, block_index().z, block_index().y, F::head_dim);
  Accumulator<F> result;
  if (part < p.splits) {
    const int pages = p.packed_end[place.request] / kPageTokens, each = (pages + p.splits - 1) / p.splits;
    const int begin = part * each, end = begin + each < pages ? begin + each : pages;
    if (begin < end) {
      result.clear();
      attend_pages<F>(p, place, begin, end, shared, result);
      result.finish();
      write_part<F, false>(p, place, part, result, shared);
    } else {
      write_empty_part(p, place, part);
    }
  } else {
    const FullRows rows(p, place.request, place.kv_head, F::head_dim);
    if (rows.count() > 0) {
      result.clear();
      attend_full_rows<F>(p, place, rows, shared, result);
      result.finish();
      write_part<F, true>(p, place, part, result, shared);
    } else {
      write_empty_part(p, place, part);
    }
  }
  if (p.arrivals && arrives_last<F>(p, place, (int*)shared)) merge_parts<F::head_dim, F::bf16, F::threads>(p, place);
}

constexpr int kMergeThreads = 128;

// For launches without arrivals. Grid (kv_heads * head tiles, requests), kMergeThreads, no shared memory.
template <int kHeadDim, bool kBf16>
KVTUNER_KERNEL(kMergeThreads, 1)
merge_kernel(const DecodeParameters p) {
  merge_parts<kHeadDim, kBf16, kMergeThreads>(p, Place(p, block_index().y, block_index().x, kHeadDim));
}

}  // namespace kvtuner::cuda
