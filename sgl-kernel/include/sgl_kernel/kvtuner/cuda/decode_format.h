// What decode attention knows of a layer at compile time.
#pragma once

#include <sgl_kernel/kvtuner/cuda/codes.h>

namespace kvtuner::cuda {

constexpr int kPageTokens = 64;
constexpr int kHeadTile = 8;           // query heads of a KV head that a block serves: the N of mma
constexpr int kRowTile = 16;           // full-precision tokens that a warp takes at a time
constexpr int kSharedMost = 99 << 10;  // shared memory of a block on sm_86, sm_89 and sm_120

constexpr int most(int a, int b) { return a > b ? a : b; }

// Layer: `key` and `value`, BlockFormats of pages of 64 tokens; `bf16`, whether the model computes in bfloat16 (else
// in float16). Kernels are made of those that are supported().
template <class Layer>
struct DecodeFormat {
  static constexpr BlockFormat key = Layer::key, value = Layer::value;
  static constexpr bool bf16 = Layer::bf16;
  static constexpr int head_dim = key.head_dim;

  using KeyUnit = Unit<key.nbits>;
  using ValueUnit = Unit<value.nbits>;
  static constexpr int key_units = head_dim / KeyUnit::elements;
  static constexpr int value_units = kPageTokens / ValueUnit::elements;

  static constexpr bool key_quantized = key.nbits != 16, value_quantized = value.nbits != 16;
  // Groups along the reduction (per-token keys, per-channel values) have their scales applied to sums; groups along the
  // other way (per-channel keys, per-token values) have them folded into queries or weights.
  static constexpr bool key_scales_sums = key_quantized && key.axis == 0;
  static constexpr bool key_scales_queries = key_quantized && key.axis == 1;
  static constexpr bool value_scales_weights = value_quantized && value.axis == 0;
  static constexpr bool value_scales_sums = value_quantized && value.axis == 1;
  static constexpr bool key_zeros = key_quantized && key.asym, value_zeros = value_quantized && value.asym;

  static constexpr int key_bytes = key.block_bytes(), value_bytes = value.block_bytes();
  // Weights of a page, once for every group of values that is folded into them: [2 * 4][8 tokens][8 heads], padded.
  static constexpr int weight_row_bytes = 8 * kHeadTile * 2 + 16;
  static constexpr int weight_bytes = 8 * weight_row_bytes;
  static constexpr int weight_sets = value_scales_weights ? value.groups() : 1;

  // Shared memory: of a warp that reads pages, of one that reads rows; a block's results, and its rotated queries.
  static constexpr int page_warp_bytes = key_bytes + value_bytes + weight_sets * weight_bytes;
  static constexpr int row_warp_bytes = kRowTile * head_dim * 2 + weight_bytes;
  static constexpr int warp_bytes = most(page_warp_bytes, row_warp_bytes);
  static constexpr int query_bytes = key.hadamard ? kHeadTile * head_dim * 4 : 0;
  static constexpr int result_bytes(int warps) { return warps * kHeadTile * (head_dim + 2) * 4; }
  static constexpr int shared_bytes_of(int warps) {
    return most(warps * warp_bytes + query_bytes, result_bytes(warps));
  }

  // As many warps as fit on every device, so that there is one instance for all of them.
  static constexpr int warps = shared_bytes_of(4) <= kSharedMost ? 4 : shared_bytes_of(2) <= kSharedMost ? 2 : 1;
  static constexpr int threads = warps * kWarpLanes;
  static constexpr int shared_bytes = shared_bytes_of(warps);
  // Blocks of an SM that registers must allow: as many as fit into the 227 KB of sm_90, but no more than are free of
  // spills.
  static constexpr int most_blocks = warps < 4 ? 1 : head_dim > 128 || value_scales_sums ? 2 : 3;
  static constexpr int fitting_blocks = (227 << 10) / (shared_bytes + 1024);
  static constexpr int blocks_per_sm = fitting_blocks < most_blocks ? fitting_blocks : most_blocks;

  // Whether pages are fragments, and registers hold what a warp needs: larger heads leave less for parameters of many
  // groups, and for float16 queries in two parts.
  KVTUNER_HD static constexpr bool supported() {
    const int key_group = key.axis == 0 ? 4 * KeyUnit::span : 32;
    const int value_group = value.axis == 0 ? 32 : 4 * ValueUnit::span;
    const bool fragments = key.page_size == kPageTokens && value.page_size == kPageTokens && key.token_lanes &&
                           !value.token_lanes && value.head_dim == head_dim && head_dim % 32 == 0 &&
                           head_dim % KeyUnit::elements == 0 && !value.hadamard &&
                           (!key_quantized || key.group_size % key_group == 0) &&
                           (!value_quantized || value.group_size % value_group == 0);
    // Measured: what spills nothing on sm_80, sm_86, sm_89 and sm_90.
    const int parameters = key.groups() * (1 + key.asym) + value.groups() * (1 + value.asym);
    const int beside = key.hadamard || !key_quantized ? 4 : 0;
    const bool registers = head_dim <= 128 || (head_dim <= 256 && parameters + beside <= 12 && (key_quantized || bf16));
    return fragments && registers && shared_bytes <= kSharedMost;
  }
};

}  // namespace kvtuner::cuda
