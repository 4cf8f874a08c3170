// What a test's library offers to Python for one layer format. The file that includes it defines `Layer`.
#pragma once

#include <csrc/kvtuner/cuda/decode.h>
#include <csrc/kvtuner/cuda/store.h>

#include "machine.h"

namespace {

using Format = kvtuner::cuda::DecodeFormat<Layer>;
using kvtuner::cuda::DecodeParameters;
using kvtuner::cuda::StoreParameters;

template <auto kernel, class Parameters>
void launch(uint3 grid, int threads, size_t shared_bytes, const Parameters& p) {
  machine::launch(grid, threads, shared_bytes, [](const void* a) { kernel(*(const Parameters*)a); }, &p);
}

}  // namespace

extern "C" {

int parameter_bytes(int store) { return store ? sizeof(StoreParameters) : sizeof(DecodeParameters); }

int decode_threads() { return Format::threads; }
int decode_shared_bytes() { return Format::shared_bytes; }
int merge_threads() { return kvtuner::cuda::kMergeThreads; }
int store_threads() { return kvtuner::cuda::kPackThreads; }
int store_shared_bytes() { return kvtuner::cuda::StoreFormat<Layer>::shared_bytes; }

void run_decode(const DecodeParameters* p, unsigned tiles, unsigned requests) {
  using namespace kvtuner::cuda;
  launch<decode_kernel<Format>>({(unsigned)p->splits + 1, tiles, requests}, Format::threads, Format::shared_bytes, *p);
}

void run_merge(const DecodeParameters* p, unsigned tiles, unsigned requests) {
  using namespace kvtuner::cuda;
  launch<merge_kernel<Format::head_dim, Format::bf16>>({tiles, requests, 1}, kMergeThreads, 0, *p);
}

void run_store(const StoreParameters* p, unsigned requests, unsigned pages, int decode) {
  using namespace kvtuner::cuda;
  const uint3 grid = {(unsigned)p->kv_heads, requests, 2 * pages};
  if (decode) return launch<store_kernel<Layer, true>>(grid, kPackThreads, StoreFormat<Layer>::shared_bytes, *p);
  launch<store_kernel<Layer, false>>(grid, kPackThreads, StoreFormat<Layer>::shared_bytes, *p);
  launch<store_rows_kernel<Layer>>({(unsigned)p->kv_heads, requests, 2u * p->row_blocks}, kPackThreads, 0, *p);
}
}
