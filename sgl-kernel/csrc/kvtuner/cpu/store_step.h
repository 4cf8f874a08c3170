// Storing a step in one layer: pages that it completes are packed, its newest tokens go into the rings.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>

namespace kvtuner {

// One completed page of one head of K or of V.
class PagePacker {
 public:
  PagePacker(const Body& body, const LayerBuffers& layer)
      : body_(body), layer_(layer), rows_(layer.page_size * layer.head_dim), codes_(layer.page_size * layer.head_dim) {}

  // own: the step's rows. index: of the page among the request's. Whether all of it is finite.
  bool pack(const TensorBuffers& half, const RowSource& own, const RequestStep& request, int64_t index, int head) {
    const int page = layer_.page_size, dim = layer_.head_dim, sinks = layer_.sink_length;
    const int64_t id = request.pages[index];
    for (int t = 0; t < page; ++t) {
      const int64_t position = index * page + t;
      const RowSource& from = request.is_query(position) ? own : half.ring;
      const char* source = from.at(request.row_of(position, layer_.ring_length), head);
      body_.load_rows(from.dtype, source, dim, rows_.data() + t * dim);
      if (position < sinks)
        std::memcpy((char*)half.sinks.at(id * sinks + position, head), source, dim * size_of(from.dtype));
    }
    uint8_t* block = half.pages + (id * layer_.kv_heads + head) * half.format.block_bytes();
    return body_.pack_page(half.format, rows_.data(), block, codes_.data());
  }

 private:
  const Body& body_;
  const LayerBuffers& layer_;
  std::vector<float> rows_;
  std::vector<uint8_t> codes_;
};

inline void keep_newest(const LayerBuffers& layer, const RowSource& k, const RowSource& v, const RequestStep& request) {
  for (const auto& [from, to] : {std::pair(&k, &layer.key.ring), std::pair(&v, &layer.value.ring)})
    for (int64_t p = std::max(request.prefix_len, request.end() - layer.ring_length); p < request.end(); ++p)
      for (int h = 0; h < layer.kv_heads; ++h) {
        const char* source = from->at(request.first_row + p - request.prefix_len, h);
        char* target = (char*)to->at(request.slot * layer.ring_length + p % layer.ring_length, h);
        std::memcpy(target, source, layer.head_dim * size_of(to->dtype));
      }
}

inline void store_step(const Body& body, const LayerBuffers& layer, const RowSource& k, const RowSource& v,
                       const std::vector<RequestStep>& requests) {
  struct Page {
    const RequestStep* request;
    int64_t index;
  };
  std::vector<Page> pages;
  for (const RequestStep& s : requests)
    for (int64_t p = s.prefix_len / layer.page_size; p < s.end() / layer.page_size; ++p) pages.push_back({&s, p});
  const int64_t count = (int64_t)requests.size(), halves = 2 * layer.kv_heads, blocks = (int64_t)pages.size() * halves;
  if (blocks == 0) {  // most decode steps: copying a row per request is not worth waking threads
    for (const RequestStep& s : requests) keep_newest(layer, k, v, s);
    return;
  }
  int64_t nonfinite = 0;
#pragma omp parallel reduction(+ : nonfinite)
  {
    PagePacker packer(body, layer);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i) {
      const Page& page = pages[i / halves];
      const bool value = i % 2;
      nonfinite += !packer.pack(value ? layer.value : layer.key, value ? v : k, *page.request, page.index,
                                (int)(i % halves / 2));
    }
    // Only now may new rows take the place of ring rows that the pages above were packed from.
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) keep_newest(layer, k, v, requests[i]);
  }
  *layer.nonfinite_blocks += nonfinite;
}

}  // namespace kvtuner
