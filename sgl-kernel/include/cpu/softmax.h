// Online softmax of rows of scores, in units of log 2. Included once per body, after a simd_*.h.

// 2^x for x <= 0, relative error 3e-6; below -100 as for -100, next to nothing. The polynomial is for what
// is left of x beside the nearest whole number, from -1/2 to 1/2.
inline F f_exp2(F x) {
  const F rounder = f_set(kRounder);
  x = f_max(x, f_set(-100.f));
  const F whole = f_add(x, rounder), f = f_sub(x, f_sub(whole, rounder));
  F y = f_set(9.570102207e-3f);
  y = f_fma(y, f, f_set(5.591785908e-2f));
  y = f_fma(y, f, f_set(2.402474433e-1f));
  y = f_fma(y, f, f_set(6.931217909e-1f));
  y = f_fma(y, f, f_set(9.999992847e-1f));
  return as_float(i_add(as_int(y), i_shl<23>(as_int(whole))));
}

struct State {
  int rows, head_dim;
  float *acc, *most, *sums;  // [rows][head_dim], [rows], [rows][kLanes]: lanes of a sum, added up at the end

  float sum(int r) const { return f_hsum(f_load(sums + r * kLanes)); }
};

constexpr float kNothing = -1e30f;

constexpr int kSoftmaxStep = 64;  // scores between two steps of fetching

inline int softmax_steps(int rows, int count) { return rows * ((count + kSoftmaxStep - 1) / kSoftmaxStep); }

// Scores to probabilities relative to the new maximum, in place; the state is rescaled where its maximum rose.
inline void softmax_row(State& st, int r, float* s, int count, PrefetchRest& later) {
  F m = f_load(s);
  for (int i = 16; i < count; i += 16) m = f_max(m, f_load(s + i));
  const float most = f_hmax(m);
  F total = f_load(st.sums + r * kLanes);
  if (most > st.most[r]) {
    float* acc = st.acc + (int64_t)r * st.head_dim;
    const F factor = f_exp2(f_set(st.most[r] - most));
    for (int i = 0; i < st.head_dim; i += 16) f_store(acc + i, f_mul(f_load(acc + i), factor));
    total = f_mul(total, factor);
    st.most[r] = most;
  }
  const F base = f_set(st.most[r]);
  for (int i = 0; i < count;) {
    later.step();
    const int chunk = count - i < kSoftmaxStep ? count : i + kSoftmaxStep;
    for (; i < chunk; i += kLanes) {
      const F p = f_exp2(f_sub(f_load(s + i), base));
      f_store(s + i, p);
      total = f_add(total, p);
    }
  }
  f_store(st.sums + r * kLanes, total);
}
