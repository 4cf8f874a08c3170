// The instructions of intrinsics.h for host compilers: declared, and defined by a test's machine.
#pragma once

#include <cmath>
#include <cstdint>

#include <sgl_kernel/kvtuner/kv_codec.h>

#define KVTUNER_DEVICE inline __attribute__((always_inline))
#define KVTUNER_KERNEL(threads, blocks) inline void
#define KVTUNER_SHARED(name) uint8_t* const name = ::kvtuner::cuda::shared_memory()
#define KVTUNER_UNROLL
#define KVTUNER_UNROLL_BY(count)

// nvcc knows these without a header.
struct uint2 {
  uint32_t x, y;
};
struct uint3 {
  uint32_t x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace kvtuner::cuda {

int thread_index();
uint3 block_index();
uint8_t* shared_memory();

void mma_emulated(bool bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const void* site);
// A call's own address tells lanes that stand at different instructions from each other.
template <bool kBf16>
__attribute__((noinline)) void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_emulated(kBf16, d, a, b, __builtin_return_address(0));
}
void load_matrices_transposed(uint32_t (&r)[4], const void* row);

void copy_async16(void* shared, const void* global);
void copy_commit();
void copy_wait_until(int pending);
template <int kPending>
void copy_wait() {
  copy_wait_until(kPending);
}

template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i)
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= (uint32_t)(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return d;
}

float exp2_approx(float x);
float log2_approx(float x);
uint32_t half2_add(uint32_t a, uint32_t b);
uint32_t half2_multiply(uint32_t a, uint32_t b);
uint32_t half2_max(uint32_t a, uint32_t b);
uint32_t pack_half2(float low, float high);
uint32_t pack_bfloat2(float low, float high);
float half_low(uint32_t a);
float half_high(uint32_t a);
uint32_t half2_of_shorts(uint32_t a);

uint32_t shuffle_xor(uint32_t x, int mask);
float shuffle_xor(float x, int mask);
int shuffle(int x, int lane);
bool warp_any(bool p);
void sync_warp();
void sync_block();

int atomic_add(int* p, int x);
void atomic_add(int64_t* p, int x);
void device_fence();

}  // namespace kvtuner::cuda
