// Instructions that a warp does together, barriers, asynchronous copies and atomics.
#include <cmath>
#include <cstring>
#include <utility>

#include "machine.h"

namespace machine {
namespace {

// All lanes of a warp meet; the last to come computes. in, out: words of this lane.
template <class Compute>
void meet(Operation operation, const void* site, const uint32_t* in, int words_in, uint32_t* out, int words_out,
          const Compute& compute) {
  Thread& me = *current;
  Warp& w = *me.warp;
  if (w.arrived == 0)
    w.operation = operation, w.site = site;
  else if (w.operation != operation || w.site != site)
    abandon("lanes of a warp at different instructions, operations", (int)w.operation, (int)operation);
  for (int i = 0; i < words_in; ++i) w.in[me.lane][i] = in[i];
  note_progress();
  if (++w.arrived == w.live) {
    if (w.live != kLanes)
      abandon("a warp's instruction without all of its lanes, operation, lanes", (int)operation, w.live);
    compute(w);
    w.arrived = 0;
    ++w.meetings;
  } else {
    const uint64_t before = w.meetings;
    while (w.meetings == before) yield();
  }
  for (int i = 0; i < words_out; ++i) out[i] = w.out[me.lane][i];
}

float half_value(uint32_t w, int high, bool bf16) {
  if (bf16) return kvtuner::float_of(high ? w & 0xffff0000u : w << 16);
  return high ? kvtuner::cuda::half_high(w) : kvtuner::cuda::half_low(w);
}

// The largest product decides which bits of the others count: they are cut there, not rounded. So do tensor cores
// (Fasi et al., "Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021).
float cut_sum(const double* x, int count) {
  constexpr int kBits = 24;
  int top = -10000;
  for (int i = 0; i < count; ++i) {
    int e = 0;
    if (x[i] != 0 && std::isfinite(x[i])) std::frexp(x[i], &e), top = e > top ? e : top;
    if (!std::isfinite(x[i])) return NAN;
  }
  if (top == -10000) return 0;
  double sum = 0;
  for (int i = 0; i < count; ++i) sum += std::trunc(std::ldexp(x[i], kBits - top));
  return (float)std::ldexp(sum, top - kBits);
}

// Lane 4 g + t holds, of A, rows g and g + 8, columns 2 t + {0, 1, 8, 9}; of B rows 2 t + {0, 1, 8, 9} of column g; of
// C and D rows g and g + 8, columns 2 t + {0, 1} (PTX ISA, "Matrix fragments for mma.m16n8k16").
void multiply(Warp& w, bool bf16) {
  float a[16][16], b[16][8];
  double d[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < 4; ++i) a[g + 8 * (i % 2)][2 * t + h + 8 * (i / 2)] = half_value(w.in[lane][i], h, bf16);
      for (int i = 0; i < 2; ++i) b[2 * t + h + 8 * i][g] = half_value(w.in[lane][4 + i], h, bf16);
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * t + i % 2] = kvtuner::float_of(w.in[lane][6 + i]);
  }
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 8; ++c)
      if (options.cutting_mma) {
        for (int half = 0; half < 16; half += 8) {
          double x[9] = {d[r][c]};
          for (int k = 0; k < 8; ++k) x[1 + k] = (double)a[r][half + k] * b[half + k][c];
          d[r][c] = cut_sum(x, 9);
        }
      } else {
        for (int k = 0; k < 16; ++k) d[r][c] += (double)a[r][k] * b[k][c];
      }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i)
      w.out[lane][i] = kvtuner::bits_of((float)d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2]);
}

bool in_shared(const uint8_t* p, size_t n) { return p >= shared_begin && p + n <= shared_begin + shared_size; }

void land(const Copy& c) {
  if (checking()) check_access(c.to, 16, true);
  memcpy(c.to, c.from, 16);
}

}  // namespace

void land_copies(size_t keep) {
  Thread& me = *current;
  while (me.pending.size() > keep) {
    if (options.late_copies)
      for (const Copy& c : me.pending.front()) land(c);
    me.pending.erase(me.pending.begin());
  }
}

}  // namespace machine

namespace kvtuner::cuda {

using machine::current;
using machine::kLanes;
using machine::Operation;
using machine::Warp;

#define HERE __builtin_return_address(0)

void mma_emulated(bool bf16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const void* site) {
  uint32_t in[10], out[4];
  for (int i = 0; i < 4; ++i) in[i] = a[i], in[6 + i] = bits_of(d[i]);
  for (int i = 0; i < 2; ++i) in[4 + i] = b[i];
  machine::meet(bf16 ? Operation::mma_bf16 : Operation::mma_f16, site, in, 10, out, 4,
                [bf16](Warp& w) { machine::multiply(w, bf16); });
  for (int i = 0; i < 4; ++i) d[i] = float_of(out[i]);
}

void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint8_t* p = (const uint8_t*)row;
  if ((uintptr_t)p % 16) machine::report("a row of ldmatrix is not aligned to 16 bytes");
  if (!machine::in_shared(p, 16)) machine::abandon("a row of ldmatrix outside of shared memory", 0, 0);
  if (machine::checking()) machine::check_access(p, 16, false);
  const uint32_t in = (uint32_t)(p - machine::shared_begin);
  machine::meet(Operation::load_matrices, HERE, &in, 1, r, 4, [](Warp& w) {
    for (int lane = 0; lane < kLanes; ++lane)
      for (int m = 0; m < 4; ++m) {
        uint16_t e[2];
        for (int h = 0; h < 2; ++h)
          memcpy(&e[h], machine::shared_begin + w.in[8 * m + 2 * (lane % 4) + h][0] + 2 * (lane / 4), 2);
        w.out[lane][m] = e[0] | (uint32_t)e[1] << 16;
      }
  });
}

static uint32_t shuffled(uint32_t x, int lane, const void* site) {
  const uint32_t in[2] = {x, (uint32_t)lane % kLanes};
  uint32_t out;
  machine::meet(Operation::shuffle, site, in, 2, &out, 1, [](Warp& w) {
    for (int lane = 0; lane < kLanes; ++lane) w.out[lane][0] = w.in[w.in[lane][1]][0];
  });
  return out;
}
uint32_t shuffle_xor(uint32_t x, int mask) { return shuffled(x, current->lane ^ mask, HERE); }
float shuffle_xor(float x, int mask) { return float_of(shuffled(bits_of(x), current->lane ^ mask, HERE)); }
int shuffle(int x, int lane) { return (int)shuffled((uint32_t)x, lane, HERE); }

bool warp_any(bool p) {
  const uint32_t in = p;
  uint32_t out;
  machine::meet(Operation::any, HERE, &in, 1, &out, 1, [](Warp& w) {
    uint32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= w.in[lane][0];
    for (int lane = 0; lane < kLanes; ++lane) w.out[lane][0] = any;
  });
  return out != 0;
}

void sync_warp() {
  machine::meet(Operation::sync_warp, HERE, nullptr, 0, nullptr, 0, [](Warp& w) { ++w.epoch; });
}

void sync_block() { machine::wait_for_block(); }

void copy_async16(void* shared, const void* global) {
  uint8_t* to = (uint8_t*)shared;
  const uint8_t* from = (const uint8_t*)global;
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) machine::report("cp.async is not aligned to 16 bytes");
  if (!machine::in_shared(to, 16)) return machine::report("cp.async outside of shared memory");
  if (machine::checking()) machine::check_access(from, 16, false);
  if (!machine::options.late_copies)
    machine::land({to, from});
  else if (machine::checking())
    machine::check_copy_start(to);
  current->open.push_back({to, from});
}

void copy_commit() { current->pending.push_back(std::exchange(current->open, {})); }

void copy_wait_until(int pending) { machine::land_copies((size_t)pending); }

int atomic_add(int* p, int x) {
  if (machine::checking())
    machine::check_access((const uint8_t*)p, 4, false), machine::check_access((uint8_t*)p, 4, true);
  return std::exchange(*p, *p + x);
}

void atomic_add(int64_t* p, int x) {
  if (machine::checking())
    machine::check_access((const uint8_t*)p, 8, false), machine::check_access((uint8_t*)p, 8, true);
  *p += x;
}

// Blocks run one after another, so that there is nothing to order.
void device_fence() {}

}  // namespace kvtuner::cuda
