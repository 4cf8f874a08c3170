// Storing a step: pages that it completes are packed, its newest tokens go into the rings. In decode both are one
// launch; what it does depends on the plan in device memory alone, so that CUDA graphs can hold it.
#pragma once

#include <sgl_kernel/kvtuner/cuda/pack_block.h>
#include <sgl_kernel/kvtuner/cuda/store_parameters.h>

namespace kvtuner::cuda {

// K or V of one request and head.
struct StoredRows {
  const uint16_t* own;  // the step's first row
  uint16_t *ring, *sinks;
  int64_t own_stride, row_stride;  // row_stride: of ring and sinks
  int prefix_len, query_len, ring_length;

  KVTUNER_DEVICE StoredRows(const StoreParameters& p, bool value, int request, int head, int dim)
      : row_stride((int64_t)p.kv_heads * dim), prefix_len(p.prefix_lens[request]), ring_length(p.ring_length) {
    const int first = p.query_start[request];
    query_len = prefix_len < 0 ? 0 : p.query_start[request + 1] - first;
    own_stride = value ? p.v_stride : p.k_stride;
    own = (value ? p.v : p.k) + first * own_stride + head * dim;
    ring = (value ? p.v_ring : p.k_ring) + p.slots[request] * ring_length * row_stride + head * dim;
    sinks = (value ? p.v_sinks : p.k_sinks) + head * dim;
  }

  KVTUNER_DEVICE int end() const { return prefix_len + query_len; }
  KVTUNER_DEVICE uint16_t* ring_row(int position) const { return ring + position % ring_length * row_stride; }
  KVTUNER_DEVICE const uint16_t* at(int position) const {
    return position >= prefix_len ? own + (position - prefix_len) * own_stride : ring_row(position);
  }
};

KVTUNER_DEVICE void copy_row(uint16_t* to, const uint16_t* from, int dim, int thread, int threads) {
  for (int i = thread; i < dim / 8; i += threads) ((uint4*)to)[i] = load16(from + 8 * i);
}

// The page of `index` among the request's, by all of the block.
template <class Layer, bool kValue>
KVTUNER_DEVICE void pack_page(const StoreParameters& p, const StoredRows& rows, int request, int head, int index,
                              uint8_t* shared) {
  using Packer = PagePacker<Layer, kValue>;
  constexpr BlockFormat format = Packer::format;
  constexpr int dim = Packer::dim, words = dim / 2;
  Packer packer(shared);
  for (int i = thread_index(); i < Packer::tokens * words; i += kPackThreads) {
    const int token = i / words, c = i % words;
    const uint32_t w = ((const uint32_t*)rows.at(index * Packer::tokens + token))[c];
    packer.rows[token * Packer::pitch + 2 * c] = low_float<Layer::bf16>(w);
    packer.rows[token * Packer::pitch + 2 * c + 1] = high_float<Layer::bf16>(w);
  }
  const int64_t id = p.pages[request * p.pages_stride + index];
  if (index == 0)
    for (int t = thread_index() / kWarpLanes; t < p.sink_length; t += Packer::warps)
      copy_row(rows.sinks + (id * p.sink_length + t) * rows.row_stride, rows.at(t), dim, thread_index() % kWarpLanes,
               kWarpLanes);
  uint8_t* pages = kValue ? p.v_pages : p.k_pages;
  const bool bad = packer.pack(pages + (id * p.kv_heads + head) * format.block_bytes());
  if (bad && thread_index() == 0) atomic_add(p.nonfinite_blocks, 1);
}

template <class Layer>
struct StoreFormat {
  static constexpr int key_bytes = PagePacker<Layer, false>::shared_bytes;
  static constexpr int value_bytes = PagePacker<Layer, true>::shared_bytes;
  static constexpr int shared_bytes = key_bytes > value_bytes ? key_bytes : value_bytes;
  static constexpr int head_dim = Layer::key.head_dim, page_size = Layer::key.page_size;
};

// Grid (kv_heads, requests, 2 * most pages that a request completes, at least 1), kPackThreads,
// StoreFormat::shared_bytes. kRows: requests have one row each, which goes into the ring.
template <class Layer, bool kRows>
KVTUNER_KERNEL(kPackThreads, 4)
store_kernel(const StoreParameters p) {
  KVTUNER_SHARED(shared);
  using F = StoreFormat<Layer>;
  const int head = block_index().x, request = block_index().y, nth = block_index().z / 2;
  const bool value = block_index().z % 2;
  const StoredRows rows(p, value, request, head, F::head_dim);
  const int index = rows.prefix_len / F::page_size + nth;
  if (kRows && nth == 0 && rows.query_len == 1)
    copy_row(rows.ring_row(rows.prefix_len), rows.own, F::head_dim, thread_index(), kPackThreads);
  if (rows.query_len == 0 || index >= rows.end() / F::page_size) return;
  if (value)
    pack_page<Layer, true>(p, rows, request, head, index, shared);
  else
    pack_page<Layer, false>(p, rows, request, head, index, shared);
}

// For extends, after store_kernel: new rows take the place of ring rows that pages were packed from.
// Grid (kv_heads, requests, 2 * row_blocks), kPackThreads, no shared memory.
template <class Layer>
KVTUNER_KERNEL(kPackThreads, 4)
store_rows_kernel(const StoreParameters p) {
  constexpr int dim = StoreFormat<Layer>::head_dim, row_threads = dim / 8;
  const int head = block_index().x, request = block_index().y;
  const StoredRows rows(p, block_index().z % 2, request, head, dim);
  const int kept = rows.query_len < rows.ring_length ? rows.query_len : rows.ring_length;
  const int in_block = kPackThreads / row_threads, thread = thread_index();
  if (thread >= in_block * row_threads) return;
  const int first = rows.end() - kept + (block_index().z / 2) * in_block + thread / row_threads;
  for (int position = first; position < rows.end(); position += in_block * p.row_blocks)
    copy_row(rows.ring_row(position), rows.at(position), dim, thread % row_threads, row_threads);
}

}  // namespace kvtuner::cuda
