// The instructions of intrinsics.h for nvcc; nothing for other compilers.
#pragma once

#ifdef __CUDACC__

#include <cstdint>

#include <sgl_kernel/kvtuner/kv_codec.h>

#define KVTUNER_DEVICE __device__ __forceinline__
#define KVTUNER_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define KVTUNER_SHARED(name) extern __shared__ __align__(128) uint8_t name[]
#define KVTUNER_UNROLL _Pragma("unroll")
#define KVTUNER_UNROLL_BY(count) _Pragma(KVTUNER_TEXT(unroll count))
#define KVTUNER_TEXT(text) #text

namespace kvtuner::cuda {

KVTUNER_DEVICE int thread_index() { return threadIdx.x; }
KVTUNER_DEVICE uint3 block_index() { return blockIdx; }

KVTUNER_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// mma.m16n8k16: d += a b in float32; a is 16 x 16, b is 16 x 8. bfloat16 or float16.
template <bool kBf16>
KVTUNER_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kBf16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ldmatrix.x4.trans: lane l gives the address of row l % 8 of matrix l / 8.
KVTUNER_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// cp.async of 16 bytes past L1, into the lane's open group; commit_group closes it; wait_group leaves kPending of them.
KVTUNER_DEVICE void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}
KVTUNER_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
KVTUNER_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// lop3.b32: any function of three words, bit by bit; a host machine computes the same from the table.
template <int kTable>
KVTUNER_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0,%1,%2,%3,%4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}
// prmt.b32
KVTUNER_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// ex2.approx.ftz, lg2.approx.ftz
KVTUNER_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}
KVTUNER_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// Two halves at once: add.rn, mul.rn, max (which prefers a number to NaN).
KVTUNER_DEVICE uint32_t half2_add(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
KVTUNER_DEVICE uint32_t half2_multiply(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
KVTUNER_DEVICE uint32_t half2_max(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// cvt, to nearest even.
KVTUNER_DEVICE uint32_t pack_half2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
KVTUNER_DEVICE uint32_t pack_bfloat2(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
KVTUNER_DEVICE float half_low(uint32_t a) {
  float y;
  asm("{.reg .f16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,l;}" : "=f"(y) : "r"(a));
  return y;
}
KVTUNER_DEVICE float half_high(uint32_t a) {
  float y;
  asm("{.reg .f16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,h;}" : "=f"(y) : "r"(a));
  return y;
}
KVTUNER_DEVICE uint32_t half2_of_shorts(uint32_t a) {
  uint32_t d;
  asm("{.reg .s16 l,h; .reg .f16 x,y; mov.b32 {l,h},%1; cvt.rn.f16.s16 x,l; cvt.rn.f16.s16 y,h; mov.b32 %0,{x,y};}"
      : "=r"(d)
      : "r"(a));
  return d;
}

// shfl.xor, shfl.idx and vote.any of a whole warp; bar.warp and bar.
KVTUNER_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
KVTUNER_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
KVTUNER_DEVICE int shuffle(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
KVTUNER_DEVICE bool warp_any(bool p) { return __any_sync(0xffffffffu, p); }
KVTUNER_DEVICE void sync_warp() { __syncwarp(); }
KVTUNER_DEVICE void sync_block() { __syncthreads(); }

// atom.add, which returns what was there; membar.gl
KVTUNER_DEVICE int atomic_add(int* p, int x) { return atomicAdd(p, x); }
KVTUNER_DEVICE void atomic_add(int64_t* p, int x) { atomicAdd((unsigned long long*)p, (unsigned long long)x); }
KVTUNER_DEVICE void device_fence() { __threadfence(); }

}  // namespace kvtuner::cuda

#endif
