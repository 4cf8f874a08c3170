// How a step's attention is cut into shares for threads.
#pragma once

#include <algorithm>
#include <vector>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>

namespace kvtuner {

// A tile of full-precision rows costs about this many packed pages.
constexpr int64_t kTailCost = 2;
// Shares per thread: enough to even out where other processes hold a core for a while.
constexpr int64_t kSharesPerThread = 2;
// A share below this many units is not worth the merge.
constexpr int64_t kMinUnits = 6;

// Work below this cost (some 20 microseconds) is done by the caller: waking threads takes about as long.
constexpr int64_t kSerialCost = 400;

struct Schedule {
  int threads = 1;
  std::vector<WorkItem> items;
  std::vector<int> first;        // per merge: its first item; the items of a merge are neighbours
  std::vector<int> count;
  int64_t partial_rows = 0;
};

// Every (sequence, KV head, block of queries) is one item, or several over ranges of its keys where one would hold the
// others up: a single long request uses all threads.
inline Schedule make_schedule(const AttendCall& c, int64_t sequences, int threads) {
  Schedule out;
  const int64_t block = tokens_per_item(c.group);
  struct Whole {
    WorkItem item;
    int64_t cost;
  };
  std::vector<Whole> wholes;
  int64_t total = 0;
  for (int64_t i = 0; i < sequences; ++i) {
    const Sequence& s = c.sequences[i];
    const int64_t packed = s.packed_end / c.key.page;
    for (int64_t begin = 0; begin < s.fresh; begin += block) {
      const int64_t end = std::min(begin + block, s.fresh), units = units_of(s, end, c.key.page);
      const int64_t weight = (end - begin) * c.group + 2;
      const int64_t cost = (packed + (units - packed) * kTailCost) * weight;
      for (int h = 0; h < c.kv_heads; ++h) {
        wholes.push_back({{(int)i, h, begin, end, 0, units, nullptr}, cost});
        total += cost;
      }
    }
  }
  out.threads = threads = total < kSerialCost ? 1 : threads;
  const int64_t share = std::max<int64_t>(1, total / (threads * kSharesPerThread));
  for (const Whole& w : wholes) {
    int64_t pieces = threads == 1 ? 1 : (w.cost + share - 1) / share;
    // Few requests: as many pieces for each thread.
    if (pieces > 1) pieces = (pieces + threads - 1) / threads * threads;
    pieces = std::max<int64_t>(1, std::min(pieces, w.item.unit_end / kMinUnits));
    if (pieces > 1) {
      out.first.push_back((int)out.items.size());
      out.count.push_back((int)pieces);
      out.partial_rows += pieces * (w.item.token_end - w.item.token_begin) * c.group;
    }
    for (int64_t p = 0; p < pieces; ++p) {
      WorkItem item = w.item;
      item.unit_begin = w.item.unit_end * p / pieces;
      item.unit_end = w.item.unit_end * (p + 1) / pieces;
      out.items.push_back(item);
    }
  }
  return out;
}

}  // namespace kvtuner
