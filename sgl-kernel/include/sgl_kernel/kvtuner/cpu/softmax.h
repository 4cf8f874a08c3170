// Online softmax of rows of scores, in units of log 2.
#pragma once

#include <sgl_kernel/kvtuner/cpu/tile_loops.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

// 2^x for x <= 0, relative error 3e-6; below -100 next to nothing. The polynomial is for what is left of x beside the
// nearest whole number, from -1/2 to 1/2.
KVTUNER_INLINE F f_exp2(F x) {
  x = f_exponent(x);
  const F whole = f_round(x), f = f_sub(x, whole);
  F y = f_set(9.570102207e-3f);
  y = f_fma(y, f, f_set(5.591785908e-2f));
  y = f_fma(y, f, f_set(2.402474433e-1f));
  y = f_fma(y, f, f_set(6.931217909e-1f));
  y = f_fma(y, f, f_set(9.999992847e-1f));
  return f_times_exp2(y, whole);
}

// The softmax over the keys so far, with the result of its products with values (FlashAttention, NeurIPS 2022, 3.1).
struct RunningSoftmax {
  int rows, head_dim;
  float *result, *running_max, *running_sum;  // [rows][head_dim], [rows], [rows][kLanes]: lanes, added up at the end

  float sum(int r) const { return f_hsum(f_load(running_sum + r * kLanes)); }
};

constexpr float kNothing = -1e30f;

// The maximum of a row with these scores; the running sum and result are rescaled where it rose.
inline F raise_maximum(RunningSoftmax& softmax, int r, const float* s, int count, F& total) {
  F m = f_load(s);
  for (int i = 16; i < count; i += 16) m = f_max(m, f_load(s + i));
  const float highest = f_hmax(m);
  total = f_load(softmax.running_sum + r * kLanes);
  if (highest > softmax.running_max[r]) {
    float* result = softmax.result + (int64_t)r * softmax.head_dim;
    const F factor = f_exp2(f_set(softmax.running_max[r] - highest));
    for (int i = 0; i < softmax.head_dim; i += 16) f_store(result + i, f_mul(f_load(result + i), factor));
    total = f_mul(total, factor);
    softmax.running_max[r] = highest;
  }
  return f_set(softmax.running_max[r]);
}

// Scores to probabilities relative to the maximum, in place.
inline void exponentials(float* s, int count, F maximum, F& total) {
  usual_count(count, [&](int count) KVTUNER_INLINE_LAMBDA {
    for (int i = 0; i < count; i += kLanes) {
      const F p = f_exp2(f_sub(f_load(s + i), maximum));
      f_store(s + i, p);
      total = f_add(total, p);
    }
  });
}

// Scores to probabilities relative to the row's new maximum, in place; the running softmax is brought up to date.
// Fetches a step for every `chunk` of them.
inline void softmax_row(RunningSoftmax& softmax, int r, float* s, int count, int chunk, Fetch& fetch) {
  F total;
  const F maximum = raise_maximum(softmax, r, s, count, total);
  for (int i = 0; i < count; i += chunk) {
    fetch.step();
    exponentials(s + i, count - i < chunk ? count - i : chunk, maximum, total);
  }
  f_store(softmax.running_sum + r * kLanes, total);
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
