// Online softmax of rows of scores, in units of log 2. Included once per body, after a simd_*.h.

// 2^x for x <= 0, relative error 2e-7; below -126 next to nothing. The polynomial is for the fraction, from 0 to 1.
inline F f_exp2(F x) {
  const F f = f_fraction(x);
  F y = f_set(1.877576664e-3f);
  y = f_fma(y, f, f_set(8.989340117e-3f));
  y = f_fma(y, f, f_set(5.582631803e-2f));
  y = f_fma(y, f, f_set(2.401536171e-1f));
  y = f_fma(y, f, f_set(6.931530732e-1f));
  y = f_fma(y, f, f_set(9.999999251e-1f));
  return f_scale2(y, x);
}

struct State {
  int rows, head_dim;
  float *acc, *most, *sums;  // [rows][head_dim], [rows], [rows][kLanes]: lanes of a sum, added up at the end

  float sum(int r) const { return f_hsum(f_load(sums + r * kLanes)); }
};

constexpr float kNothing = -1e30f;

// Scores to probabilities relative to the new maximum, in place; the state is rescaled where its maximum rose.
inline void softmax_row(State& st, int r, float* s, int count) {
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
  for (int i = 0; i < count; i += 16) {
    const F p = f_exp2(f_sub(f_load(s + i), base));
    f_store(s + i, p);
    total = f_add(total, p);
  }
  f_store(st.sums + r * kLanes, total);
}
