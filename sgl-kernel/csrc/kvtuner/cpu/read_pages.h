// Reading packed pages, and nothing else: the time that attention over them cannot go below.
#pragma once

#include <cstring>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>

namespace kvtuner {

// blocks: [pages][kv_heads][bytes] of keys and of values.
struct PageBlocks {
  const uint8_t* data[2];
  int64_t bytes[2];
  int64_t kv_heads;
};

// The sum of all words in the pages of all sequences, head by head in the order of their pages, on all threads.
inline uint64_t read_pages(const PageBlocks& b, const Sequence* sequences, int64_t count, const int32_t* pages,
                           int64_t page) {
  uint64_t sum = 0;
#pragma omp parallel reduction(+ : sum)
  for (int64_t s = 0; s < count; ++s) {
    const int64_t packed = sequences[s].packed_end / page, blocks = packed * b.kv_heads;
    const int32_t* ids = pages + sequences[s].page_begin;
    const auto block_of = [&](int which, int64_t i) {
      return b.data[which] + (ids[i % packed] * b.kv_heads + i / packed) * b.bytes[which];
    };
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < blocks; ++i)
      for (int which = 0; which < 2; ++which) {
        const uint8_t *at = block_of(which, i), *next = i + 1 < blocks ? block_of(which, i + 1) : at;
        uint64_t words[8] = {};
        int64_t byte = 0;
        for (; byte + 64 <= b.bytes[which]; byte += 64) {
          __builtin_prefetch(next + byte, 0, 3);
          uint64_t line[8];
          std::memcpy(line, at + byte, 64);
          for (int w = 0; w < 8; ++w) words[w] += line[w];
        }
        for (; byte < b.bytes[which]; ++byte) sum += at[byte];
        for (const uint64_t word : words) sum += word;
      }
  }
  return sum;
}

}  // namespace kvtuner
