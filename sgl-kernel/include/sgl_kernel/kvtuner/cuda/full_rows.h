// Attention over what a request has in full precision: sinks, the rows of its ring, and the step's own token.
#pragma once

#include <sgl_kernel/kvtuner/cuda/accumulator.h>
#include <sgl_kernel/kvtuner/cuda/decode_parameters.h>

namespace kvtuner::cuda {

// The rows of one request and KV head, counted in that order.
struct FullRows {
  const DecodeParameters& p;
  int64_t slot;
  int request, head, head_dim, sinks, packed_end, prefix_len;

  KVTUNER_DEVICE FullRows(const DecodeParameters& p, int request, int head, int head_dim)
      : p(p),
        slot(p.slots[request]),
        request(request),
        head(head),
        head_dim(head_dim),
        packed_end(p.packed_end[request]),
        prefix_len(p.prefix_lens[request]) {
    sinks = packed_end > 0 ? p.sink_length : 0;
  }

  KVTUNER_DEVICE int count() const { return prefix_len < 0 ? 0 : sinks + prefix_len - packed_end + 1; }

  // The row's start. From the last row on all are the step's own, so that tiles need no bounds.
  KVTUNER_DEVICE const uint16_t* at(int i, const uint16_t* sink_rows, const uint16_t* ring, const uint16_t* own,
                                    int64_t own_stride) const {
    const int position = packed_end + i - sinks;
    if (i >= sinks && position >= prefix_len) return own + request * own_stride + head * head_dim;
    const int64_t row = i < sinks ? (int64_t)p.pages[request * p.pages_stride] * p.sink_length + i
                                  : slot * p.ring_length + position % p.ring_length;
    return (i < sinks ? sink_rows : ring) + (row * p.kv_heads + head) * head_dim;
  }
  KVTUNER_DEVICE const uint16_t* key(int i) const { return at(i, p.k_sinks, p.k_ring, p.k, p.k_stride); }
  KVTUNER_DEVICE const uint16_t* value(int i) const { return at(i, p.v_sinks, p.v_ring, p.v, p.v_stride); }
};

// A warp's tiles of 16 rows. Keys come straight from memory, values through shared memory, both in the model's dtype.
template <class F>
struct RowProduct {
  static constexpr int dim = F::head_dim;
  static constexpr int units = dim / 32;
  // 16-byte pieces of rows are swizzled, as far as their number allows.
  static constexpr int swizzle = dim % 64 ? 3 : 7;

  uint32_t query[units][2][2];  // of head g: 8 neighbouring channels of two k-steps

  KVTUNER_DEVICE void load_queries(const uint16_t* row, bool present, int lane) {
    KVTUNER_UNROLL
    for (int u = 0; u < units; ++u) {
      const uint4 w = present ? load16(row + 8 * (4 * u + lane % 4)) : uint4{0, 0, 0, 0};
      KVTUNER_UNROLL
      for (int i = 0; i < 4; ++i) query[u][i / 2][i % 2] = word_of(w, i);
    }
  }

  // Rows from first on, of which those from `count` on are masked. shared: the warp's own.
  KVTUNER_DEVICE void add(const FullRows& rows, int first, int count, float scale_log2, uint8_t* shared, int lane,
                          Accumulator<F>& to) const {
    const int g = lane / 4, t = lane % 4;
    uint8_t* tile = shared + F::weight_bytes;
    constexpr int pieces = dim / 8;
    KVTUNER_UNROLL
    for (int n = 0; n < kRowTile * pieces / kWarpLanes; ++n) {
      const int i = n * kWarpLanes + lane, row = i / pieces, piece = i % pieces;
      copy_async16(tile + row * dim * 2 + (piece ^ (row & swizzle)) * 16, rows.value(first + row) + piece * 8);
    }
    copy_commit();

    float s[1][4] = {};
    const uint16_t* low = rows.key(first + g) + 8 * t;
    const uint16_t* high = rows.key(first + g + 8) + 8 * t;
    KVTUNER_UNROLL
    for (int u = 0; u < units; ++u) {
      const uint4 x = load16(low + 32 * u), y = load16(high + 32 * u);
      const uint32_t a[4] = {x.x, y.x, x.y, y.y}, b[4] = {x.z, y.z, x.w, y.w};
      mma<F::bf16>(s[0], a, query[u][0]);
      mma<F::bf16>(s[0], b, query[u][1]);
    }
    KVTUNER_UNROLL
    for (int j = 0; j < 4; ++j)
      if (first + g + j / 2 * 8 >= count) s[0][j] = -INFINITY;

    const float logit_scale[2] = {scale_log2, scale_log2};
    to.raise(s, logit_scale, 0);  // weights of rows have no scales of values
    KVTUNER_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float p0 = exp2_approx(s[0][2 * e] * scale_log2 + to.lowered(0));
      const float p1 = exp2_approx(s[0][2 * e + 1] * scale_log2 + to.lowered(1));
      to.sum[0] += p0, to.sum[1] += p1;
      *(uint32_t*)(shared + (8 * e + g) * 16 + t * 4) = pack_floats<F::bf16>(p0, p1);
    }
    copy_wait<0>();
    sync_warp();
    uint32_t r[4];
    load_matrices_transposed(r, shared + lane % 16 * 16);
    const uint32_t b[2] = {r[0], r[1]};
    KVTUNER_UNROLL
    for (int c = 0; c < dim / 16; ++c) {
      const int token = lane % 8 + lane / 16 * 8, piece = 2 * c + lane / 8 % 2;
      uint32_t a[4];
      load_matrices_transposed(a, tile + token * dim * 2 + (piece ^ (token & swizzle)) * 16);
      mma<F::bf16>(to.out[c], a, b);
    }
    sync_warp();
  }
};

// The channel of out[tile][register] in either kind of warp.
template <bool kRows>
KVTUNER_DEVICE int channel_of(int tile, int j, int g) {
  return kRows ? 16 * tile + g + j / 2 * 8 : tile / 2 * 32 + 4 * g + tile % 2 * 2 + j / 2;
}

}  // namespace kvtuner::cuda
