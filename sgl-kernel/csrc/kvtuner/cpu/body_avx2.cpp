// The body of the CPU kernels for AVX2 (with FMA and F16C).
//
// Headers that other files share come before the pragma: code compiled for this instruction set stays in the body's
// own namespace, so that the linker cannot give it to a machine without.
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/store_out.h>
#include <sgl_kernel/kvtuner/kv_codec.h>

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

namespace kvtuner {
namespace {
namespace avx2 {
#include <sgl_kernel/kvtuner/cpu/simd_avx2.h>

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
}  // namespace avx2
}  // namespace
}  // namespace kvtuner

#pragma GCC pop_options

namespace kvtuner {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

const Body kAvx2Body{"avx2", supported, avx2::scratch_bytes, avx2::attend, avx2::pack, avx2::load_rows};
}  // namespace kvtuner
#else
namespace kvtuner {
const Body kAvx2Body{"avx2", [] { return false; }, nullptr, nullptr, nullptr, nullptr};
}  // namespace kvtuner
#endif
