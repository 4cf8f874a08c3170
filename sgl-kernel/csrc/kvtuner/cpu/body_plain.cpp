// The body of the CPU kernels for plain C++.
//
// It runs everywhere and is what the other bodies are compared with.
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/store_out.h>
#include <sgl_kernel/kvtuner/kv_codec.h>

namespace kvtuner {
namespace {
namespace plain {
#include <sgl_kernel/kvtuner/cpu/simd_plain.h>

#include <sgl_kernel/kvtuner/cpu/tile_loops.h>

#include <sgl_kernel/kvtuner/cpu/block_product.h>

#include <sgl_kernel/kvtuner/cpu/block_rows.h>

#include <sgl_kernel/kvtuner/cpu/block_multiply.h>

#include <sgl_kernel/kvtuner/cpu/hadamard.h>

#include <sgl_kernel/kvtuner/cpu/softmax.h>

#include <sgl_kernel/kvtuner/cpu/weights.h>

#include <sgl_kernel/kvtuner/cpu/attend_tail.h>

#include <sgl_kernel/kvtuner/cpu/attend_body.h>

#include <sgl_kernel/kvtuner/cpu/pack_body.h>
}  // namespace plain
}  // namespace
}  // namespace kvtuner

namespace kvtuner {
namespace {
bool supported() { return true; }
}  // namespace

const Body kPlainBody{"plain", supported, plain::scratch_bytes, plain::attend, plain::pack, plain::load_rows};
}  // namespace kvtuner
