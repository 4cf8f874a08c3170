// Results of warps to a block's, and of blocks to a request's.
#pragma once

#include <sgl_kernel/kvtuner/cuda/accumulator.h>
#include <sgl_kernel/kvtuner/cuda/decode_parameters.h>
#include <sgl_kernel/kvtuner/cuda/full_rows.h>

namespace kvtuner::cuda {

// Where a block's work lies in the grid, and in the buffers.
struct Place {
  int request, kv_head, heads;  // heads: of this tile
  int64_t first_part;           // of the request's tile; parts are those of the splits, then that of full rows
  int64_t tile;                 // among the arrivals
  int64_t out;                  // element of the tile's first head in a row of q or out

  KVTUNER_DEVICE Place(const DecodeParameters& p, int request, int tile_index, int head_dim) : request(request) {
    const int tiles = (p.group + kHeadTile - 1) / kHeadTile, first = tile_index % tiles * kHeadTile;
    kv_head = tile_index / tiles;
    heads = p.group - first < kHeadTile ? p.group - first : kHeadTile;
    tile = (int64_t)request * p.kv_heads * tiles + tile_index;
    first_part = tile * (p.splits + 1);
    out = ((int64_t)kv_head * p.group + first) * head_dim;
  }
};

// The block's warps to its part. The warps' results go through all of the shared memory.
template <class F, bool kRows>
KVTUNER_DEVICE void write_part(const DecodeParameters& p, const Place& place, int part, const Accumulator<F>& from,
                               uint8_t* shared) {
  constexpr int dim = F::head_dim;
  const int warp = thread_index() / kWarpLanes, lane = thread_index() % kWarpLanes, g = lane / 4, t = lane % 4;
  float* results = (float*)shared;                     // [warps][kHeadTile][dim]
  float* sums = results + F::warps * kHeadTile * dim;  // [warps][kHeadTile][highest, sum]
  sync_block();
  KVTUNER_UNROLL
  for (int i = 0; i < Accumulator<F>::tiles; ++i) KVTUNER_UNROLL
  for (int j = 0; j < 4; ++j)
    results[(warp * kHeadTile + 2 * t + j % 2) * dim + channel_of<kRows>(i, j, g)] = from.out[i][j];
  if (g == 0) {
    KVTUNER_UNROLL
    for (int j = 0; j < 2; ++j) {
      sums[(warp * kHeadTile + 2 * t + j) * 2] = from.highest[j];
      sums[(warp * kHeadTile + 2 * t + j) * 2 + 1] = from.sum[j];
    }
  }
  sync_block();
  const int64_t first = (place.first_part + part) * kHeadTile;
  for (int i = thread_index(); i < place.heads * dim; i += F::threads) {
    const int h = i / dim, c = i % dim;
    float highest = -INFINITY, sum = 0, value = 0;
    KVTUNER_UNROLL
    for (int w = 0; w < F::warps; ++w) highest = fmaxf(highest, sums[(w * kHeadTile + h) * 2]);
    KVTUNER_UNROLL
    for (int w = 0; w < F::warps; ++w) {
      const float x = sums[(w * kHeadTile + h) * 2], weight = x == -INFINITY ? 0.f : exp2_approx(x - highest);
      sum += weight * sums[(w * kHeadTile + h) * 2 + 1];
      value += weight * results[(w * kHeadTile + h) * dim + c];
    }
    p.part_out[(first + h) * dim + c] = sum == 0 ? 0.f : value / sum;
    if (c == 0) p.part_lse[first + h] = sum == 0 ? -INFINITY : highest + log2_approx(sum);
  }
}

// A part that nothing was read for. Its results are never read.
KVTUNER_DEVICE void write_empty_part(const DecodeParameters& p, const Place& place, int part) {
  const int h = thread_index();
  if (h < place.heads) p.part_lse[(place.first_part + part) * kHeadTile + h] = -INFINITY;
}

// A tile's parts to rows of out. A request without any has zeros.
template <int kHeadDim, bool kBf16, int kThreads>
KVTUNER_DEVICE void merge_parts(const DecodeParameters& p, const Place& place) {
  uint16_t* out = p.out + place.request * p.out_stride + place.out;
  for (int i = thread_index(); i < place.heads * kHeadDim / 2; i += kThreads) {
    const int h = 2 * i / kHeadDim, c = 2 * i % kHeadDim;
    const float* lse = p.part_lse + place.first_part * kHeadTile + h;
    const float* parts = p.part_out + (place.first_part * kHeadTile + h) * kHeadDim + c;
    float highest = -INFINITY, sum = 0;
    float2 value = {0, 0};
    for (int s = 0; s <= p.splits; ++s) highest = fmaxf(highest, lse[s * kHeadTile]);
    for (int s = 0; s <= p.splits; ++s) {
      const float x = lse[s * kHeadTile];
      if (x == -INFINITY) continue;
      const float weight = exp2_approx(x - highest);
      const float2 part = *(const float2*)(parts + (int64_t)s * kHeadTile * kHeadDim);
      sum += weight, value.x += weight * part.x, value.y += weight * part.y;
    }
    const float inverse = sum == 0 ? 0.f : 1.f / sum;
    ((uint32_t*)out)[i] = pack_floats<kBf16>(value.x * inverse, value.y * inverse);
  }
}

// Whether this block is the last of its tile, so that all parts can be read. Resets the counter for the next launch.
// shared: one int.
template <class F>
KVTUNER_DEVICE bool arrives_last(const DecodeParameters& p, const Place& place, int* shared) {
  device_fence();
  sync_block();  // all of the block's part is written, and its shared memory read
  if (thread_index() == 0) {
    const int before = atomic_add(p.arrivals + place.tile, 1);
    if (before == p.splits) p.arrivals[place.tile] = 0;
    *shared = before == p.splits;
  }
  sync_block();
  const bool last = *shared != 0;
  if (last) device_fence();
  return last;
}

}  // namespace kvtuner::cuda
