// How a step's attention is cut into shares for threads.
#pragma once

#include <algorithm>
#include <vector>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>

namespace kvtuner {

// A tile of full-precision rows costs about this many pages of codes; an unquantized page costs about as much as it.
constexpr int64_t kTileCost = 3;
// Shares per thread: enough to even out where other processes hold a core for a while.
constexpr int64_t kSharesPerThread = 2;
// A share below this many units is not worth the merge.
constexpr int64_t kMinUnits = 6;

// Work below this cost (some 20 microseconds) is done by the caller: waking threads takes about as long.
constexpr int64_t kSerialCost = 400;

struct Schedule {
  int threads = 1;
  std::vector<WorkItem> items;
  std::vector<int> first;  // per merge: its first item; the items of a merge are neighbours
  std::vector<int> count;
  int64_t partial_rows = 0;
};

// Every (request, KV head, block of queries) is one item, or several over ranges of its keys where one would hold the
// others up: a single long request uses all threads.
inline Schedule make_schedule(const AttendCall& c, int64_t requests, int threads) {
  Schedule out;
  const int64_t block = tokens_per_item(c.group);
  const int64_t tile_cost = c.layer.key.format.nbits == 16 && c.layer.value.format.nbits == 16 ? 1 : kTileCost;
  struct Whole {
    WorkItem item;
    int64_t packed, pages, cost;  // pages: all units in units of cost of a page

    // The unit before which about part / parts of the cost lies.
    int64_t unit_at(int64_t part, int64_t parts, int64_t tile_cost) const {
      const int64_t at = pages * part / parts;
      return at <= packed ? at : std::min(item.unit_end, packed + (at - packed) / tile_cost);
    }
  };
  std::vector<Whole> wholes;
  int64_t total = 0;
  for (int64_t i = 0; i < requests; ++i) {
    const RequestStep& s = c.requests[i];
    const int64_t packed = s.packed_end / c.layer.page_size;
    for (int64_t begin = 0; begin < s.query_len; begin += block) {
      const int64_t end = std::min(begin + block, s.query_len), units = units_of(s, end, c.layer.page_size);
      const int64_t weight = (end - begin) * c.group + 2;
      const int64_t pages = packed + (units - packed) * tile_cost;
      for (int h = 0; h < c.layer.kv_heads; ++h) {
        wholes.push_back({{(int)i, h, begin, end, 0, units, nullptr}, packed, pages, pages * weight});
        total += pages * weight;
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
      item.unit_begin = w.unit_at(p, pieces, tile_cost);
      item.unit_end = p + 1 < pieces ? w.unit_at(p + 1, pieces, tile_cost) : w.item.unit_end;
      out.items.push_back(item);
    }
  }
  return out;
}

}  // namespace kvtuner
