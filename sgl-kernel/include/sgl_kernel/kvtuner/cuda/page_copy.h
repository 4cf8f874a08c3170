// Blocks of pages on their way to shared memory.
#pragma once

#include <sgl_kernel/kvtuner/cuda/codes.h>

namespace kvtuner::cuda {

// Starts a warp's copy of a block, code rows of kRowBytes swizzled, parameters as they are.
template <int kRowBytes, int kCodeBytes, int kBytes>
KVTUNER_DEVICE void copy_block(uint8_t* to, const uint8_t* from, int lane) {
  constexpr int pieces = kBytes / 16, row_pieces = kRowBytes / 16;
  KVTUNER_UNROLL
  for (int n = 0; n < (pieces + kWarpLanes - 1) / kWarpLanes; ++n) {
    const int i = n * kWarpLanes + lane;
    if (pieces % kWarpLanes && i >= pieces) break;
    const int row = i / row_pieces, at = row * row_pieces + swizzled(i % row_pieces, row);
    copy_async16(to + (i < kCodeBytes / 16 ? at : i) * 16, from + i * 16);
  }
}

}  // namespace kvtuner::cuda
