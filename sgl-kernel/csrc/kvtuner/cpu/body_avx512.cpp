// The body of the CPU kernels for AVX-512 (F, BW, VL, DQ, VNNI).
//
// Headers that other files share come before the pragma (see attend_types.h).
#include <sgl_kernel/kvtuner/cpu/attend_types.h>
#include <sgl_kernel/kvtuner/cpu/store_out.h>

#if defined(__x86_64__)
#include <immintrin.h>

// With its general tuning GCC 12 keeps what general registers have no room for in vector registers, where it waits
// behind all vector instructions: tiles take up to a tenth longer.
#pragma GCC push_options
#pragma GCC target("tune=skylake-avx512,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,bmi2")
#define KVTUNER_ISA avx512
#define KVTUNER_SIMD <sgl_kernel/kvtuner/cpu/simd_avx512.h>
#include <sgl_kernel/kvtuner/cpu/attend_body.h>
#include <sgl_kernel/kvtuner/cpu/pack_page.h>
#pragma GCC pop_options

namespace kvtuner {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
}  // namespace

const Body kAvx512Body{"avx512",       supported,         avx512::scratch_bytes,
                       avx512::attend, avx512::pack_page, avx512::load_rows};
}  // namespace kvtuner
#else
namespace kvtuner {
const Body kAvx512Body{"avx512", [] { return false; }, nullptr, nullptr, nullptr, nullptr};
}  // namespace kvtuner
#endif
