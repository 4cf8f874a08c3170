// Blocks of pages on their way to shared memory.
#pragma once

#include <sgl_kernel/kvtuner/cuda/codes.h>

namespace kvtuner::cuda {

// Compilers keep the addresses of an unrolled copy in registers, which copies of larger blocks do not leave.
constexpr int kUnrolledBytes = 16 << 10;

template <int kRowBytes, int kCodeBytes>
KVTUNER_DEVICE void copy_piece(uint8_t* to, const uint8_t* from, int i) {
  constexpr int row_pieces = kRowBytes / 16;
  const int row = i / row_pieces, at = row * row_pieces + swizzled(i % row_pieces, row);
  copy_async16(to + (i < kCodeBytes / 16 ? at : i) * 16, from + i * 16);
}

// Starts a warp's copy of a block, code rows of kRowBytes swizzled, parameters as they are.
template <int kRowBytes, int kCodeBytes, int kBytes>
KVTUNER_DEVICE void copy_block(uint8_t* to, const uint8_t* from, int lane) {
  constexpr int pieces = kBytes / 16;
  if constexpr (kBytes > kUnrolledBytes) {
    KVTUNER_UNROLL_BY(4)
    for (int i = lane; i < pieces; i += kWarpLanes) copy_piece<kRowBytes, kCodeBytes>(to, from, i);
  } else {
    KVTUNER_UNROLL
    for (int n = 0; n < (pieces + kWarpLanes - 1) / kWarpLanes; ++n) {
      const int i = n * kWarpLanes + lane;
      if (pieces % kWarpLanes && i >= pieces) break;
      copy_piece<kRowBytes, kCodeBytes>(to, from, i);
    }
  }
}

}  // namespace kvtuner::cuda
