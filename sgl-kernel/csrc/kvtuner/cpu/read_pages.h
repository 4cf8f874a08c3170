// Reading packed pages, and nothing else: the time that attention over them cannot go below.
#pragma once

#include <cstring>
#include <vector>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>

namespace kvtuner {

// The sum of all words in the pages of all requests, head by head in the order of their pages, on all threads.
inline uint64_t read_pages(const LayerBuffers& layer, const std::vector<RequestStep>& requests) {
  uint64_t sum = 0;
#pragma omp parallel reduction(+ : sum)
  for (const RequestStep& request : requests) {
    const int64_t packed = request.packed_end / layer.page_size, blocks = packed * layer.kv_heads;
    const auto block_of = [&](const TensorBuffers& half, int64_t i) {
      return half.pages +
             (request.pages[i % packed] * (int64_t)layer.kv_heads + i / packed) * half.format.block_bytes();
    };
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < blocks; ++i)
      for (const TensorBuffers* half : {&layer.key, &layer.value}) {
        const uint8_t *at = block_of(*half, i), *next = i + 1 < blocks ? block_of(*half, i + 1) : at;
        const int64_t bytes = half->format.block_bytes();
        uint64_t words[8] = {};
        int64_t byte = 0;
        for (; byte + 64 <= bytes; byte += 64) {
          __builtin_prefetch(next + byte, 0, 3);
          uint64_t line[8];
          std::memcpy(line, at + byte, 64);
          for (int w = 0; w < 8; ++w) words[w] += line[w];
        }
        for (; byte < bytes; ++byte) sum += at[byte];
        for (const uint64_t word : words) sum += word;
      }
  }
  return sum;
}

}  // namespace kvtuner
