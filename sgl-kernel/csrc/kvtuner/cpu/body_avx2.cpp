// The body of the CPU kernels for AVX2 (with FMA and F16C).
//
// Headers that other files share come before the pragma (see attend_types.h).
#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/store_out.h>

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define KVTUNER_ISA avx2
#define KVTUNER_SIMD <sgl_kernel/kvtuner/cpu/simd_avx2.h>
#include <sgl_kernel/kvtuner/cpu/attend_body.h>
#include <sgl_kernel/kvtuner/cpu/pack_page.h>
#pragma GCC pop_options

namespace kvtuner {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace

const Body kAvx2Body{"avx2", supported, avx2::scratch_bytes, avx2::attend, avx2::pack_page, avx2::load_rows};
}  // namespace kvtuner
#else
namespace kvtuner {
const Body kAvx2Body{"avx2", [] { return false; }, nullptr, nullptr, nullptr, nullptr};
}  // namespace kvtuner
#endif
