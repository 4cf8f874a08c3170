// One work item of attention: online softmax over pages and full-precision tiles. Included once per body.

inline void load_rows(Dtype dtype, const void* from, int64_t count, float* to) {
  if (dtype == Dtype::f32) {
    memcpy(to, from, count * 4);
  } else if (dtype == Dtype::bf16) {
    for (int64_t i = 0; i < count; i += 16) f_store(to + i, load_bf16((const uint16_t*)from + i));
  } else {
    for (int64_t i = 0; i < count; i += 16) f_store(to + i, load_half((const uint16_t*)from + i));
  }
}

inline const void* row_at(const RowSource& s, int64_t row, int64_t head) {
  return (const char*)s.data + (row * s.row_stride + head * s.head_stride) * (s.dtype == Dtype::f32 ? 4 : 2);
}

// 2^x for x <= 0, relative error 2e-7; below -126 a value near the smallest float.
inline F f_exp2(F x) {
  x = f_max(x, f_set(-126.f));
  const I n = to_int(x);
  const F f = f_sub(x, to_float(n));
  F y = f_set(1.5403530e-4f);
  y = f_fma(y, f, f_set(1.3333558e-3f));
  y = f_fma(y, f, f_set(9.6181291e-3f));
  y = f_fma(y, f, f_set(5.5504109e-2f));
  y = f_fma(y, f, f_set(2.4022651e-1f));
  y = f_fma(y, f, f_set(6.9314718e-1f));
  y = f_fma(y, f, f_set(1.f));
  return f_mul(y, as_float(i_shl<23>(i_add(n, i_set(127)))));
}

struct State {
  int rows, head_dim;
  float *acc, *most, *sum;  // [rows][head_dim], [rows], [rows]
};

constexpr float kNothing = -1e30f;

// Scores to probabilities relative to the new maximum, in place; the state is rescaled where its maximum rose.
inline void softmax_row(State& st, int r, float* s, int count) {
  F m = f_load(s);
  for (int i = 16; i < count; i += 16) m = f_max(m, f_load(s + i));
  const float most = f_hmax(m);
  if (most > st.most[r]) {
    float* acc = st.acc + (int64_t)r * st.head_dim;
    float factor[16];
    f_store(factor, f_exp2(f_set(st.most[r] - most)));
    for (int i = 0; i < st.head_dim; i += 16) f_store(acc + i, f_mul(f_load(acc + i), f_set(factor[0])));
    st.sum[r] *= factor[0];
    st.most[r] = most;
  }
  const F base = f_set(st.most[r]);
  F total = f_set(0.f);
  for (int i = 0; i < count; i += 16) {
    const F p = f_exp2(f_sub(f_load(s + i), base));
    f_store(s + i, p);
    total = f_add(total, p);
  }
  st.sum[r] += f_hsum(total);
}

struct Scratch {
  float *q, *page_q, *scores, *key_rows, *key_tile, *value_tile;
  Rows16 q16;
  FoldScratch fold;
  State state;

  Scratch(const AttendCall& c, int rows, void* memory) {
    Carver carve{(char*)memory};
    const int dim = c.head_dim, widest = dim > c.key.page ? dim : c.key.page;
    const int groups = c.key.groups() > c.value.groups() ? c.key.groups() : c.value.groups();
    const int tokens = c.key.page > kTailTokens ? c.key.page : kTailTokens;
    q = carve.take<float>(rows * dim);
    page_q = c.key.hadamard ? carve.take<float>(rows * dim) : q;
    scores = carve.take<float>(rows * tokens);
    key_rows = carve.take<float>(kTailTokens * dim);
    key_tile = carve.take<float>(kTailTokens * dim);
    value_tile = carve.take<float>(kTailTokens * dim);
    for (Rows16* r : {&q16, &fold.rows})
      *r = {carve.take<int16_t>(rows * widest), carve.take<float>(rows), carve.take<float>(rows * groups),
            carve.take<float>(rows * groups)};
    fold.folded = carve.take<float>(rows * widest);
    fold.extra = carve.take<float>(rows);
    state = {rows, dim, carve.take<float>(rows * dim), carve.take<float>(rows), carve.take<float>(rows)};
  }
};

// Scores of a tile of full-precision keys. Few rows (decode) take dot products along channels; many rows pay for
// turning the tile so that tokens are lanes.
inline void tail_scores(Scratch& s, int rows, int dim, int count) {
  if (rows <= 8) {
    for (int t = 0; t < count; ++t)
      for (int r = 0; r < rows; ++r) {
        F sum = f_set(0.f);
        for (int i = 0; i < dim; i += 16)
          sum = f_fma(f_load(s.q + r * dim + i), f_load(s.key_rows + t * dim + i), sum);
        s.scores[r * kTailTokens + t] = f_hsum(sum);
      }
    return;
  }
  for (int t = 0; t < kTailTokens; t += 16)
    for (int i = 0; i < dim; i += 16)
      transpose16(s.key_rows + t * dim + i, dim, s.key_tile + i * kTailTokens + t, kTailTokens);
  memset(s.scores, 0, sizeof(float) * rows * kTailTokens);
  cover(rows, kTailTokens / kLanes,
        FloatTile<32>{(const uint8_t*)s.key_tile, nullptr, kTailTokens * 4, dim, s.q, dim, s.scores, kTailTokens});
}

// The tile of `count` rows in key_rows and value_tile (zeros after them), of the positions from `begin` on.
inline void attend_tile(const AttendCall& c, const WorkItem& item, Scratch& s, int64_t begin, int count) {
  const Sequence& seq = c.sequences[item.sequence];
  const int dim = c.head_dim, rows = s.state.rows;
  tail_scores(s, rows, dim, count);
  for (int r = 0; r < rows; ++r) {
    float* scores = s.scores + r * kTailTokens;
    const int64_t visible = seq.prior + item.token_begin + r / c.group + 1 - begin;
    const int limit = visible < count ? (int)visible : count;
    if (limit <= 0) {
      memset(scores, 0, sizeof(float) * kTailTokens);
      continue;
    }
    for (int t = limit; t < kTailTokens; ++t) scores[t] = -1e38f;
    softmax_row(s.state, r, scores, kTailTokens);
  }
  cover(rows, dim / kLanes,
        FloatTile<32>{(const uint8_t*)s.value_tile, nullptr, dim * 4, count, s.scores, kTailTokens, s.state.acc, dim});
}

inline void attend_tail(const AttendCall& c, const WorkItem& item, Scratch& s, int64_t begin, int64_t end) {
  const Sequence& seq = c.sequences[item.sequence];
  const int dim = c.head_dim, count = (int)(end - begin);
  for (int t = 0; t < kTailTokens; ++t) {
    float *k = s.key_rows + t * dim, *v = s.value_tile + t * dim;
    const int64_t position = begin + t;
    if (t >= count) {
      memset(k, 0, dim * 4), memset(v, 0, dim * 4);
      continue;
    }
    const bool fresh = position >= seq.prior;
    const int64_t row = fresh ? seq.first + position - seq.prior : seq.slot * c.ring_length + position % c.ring_length;
    const RowSource &ks = fresh ? c.k_new : c.k_ring, &vs = fresh ? c.v_new : c.v_ring;
    load_rows(ks.dtype, row_at(ks, row, item.kv_head), dim, k);
    load_rows(vs.dtype, row_at(vs, row, item.kv_head), dim, v);
  }
  attend_tile(c, item, s, begin, count);
}

// A first page's codes of sinks are not looked at ...
inline void hide_sinks(const AttendCall& c, float* scores, int rows) {
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < c.sinks; ++t) scores[r * c.key.page + t] = -1e38f;
}

// ... but the rows that are kept beside it.
inline void attend_sinks(const AttendCall& c, const WorkItem& item, Scratch& s, int64_t page_id) {
  const int dim = c.head_dim;
  for (int begin = 0; begin < c.sinks; begin += kTailTokens) {
    const int count = c.sinks - begin < kTailTokens ? c.sinks - begin : kTailTokens;
    for (int t = 0; t < count; ++t) {
      const int64_t row = page_id * c.sinks + begin + t;
      load_rows(c.k_sinks.dtype, row_at(c.k_sinks, row, item.kv_head), dim, s.key_rows + t * dim);
      load_rows(c.v_sinks.dtype, row_at(c.v_sinks, row, item.kv_head), dim, s.value_tile + t * dim);
    }
    memset(s.key_rows + count * dim, 0, sizeof(float) * (kTailTokens - count) * dim);
    memset(s.value_tile + count * dim, 0, sizeof(float) * (kTailTokens - count) * dim);
    attend_tile(c, item, s, begin, count);
  }
}

inline void store_result(const AttendCall& c, const WorkItem& item, const State& st) {
  const Sequence& seq = c.sequences[item.sequence];
  for (int r = 0; r < st.rows; ++r) {
    const float inverse = 1.f / st.sum[r];
    const int64_t row = seq.first + item.token_begin + r / c.group, head = item.kv_head * c.group + r % c.group;
    store_out(c, row, head, st.acc + (int64_t)r * st.head_dim, inverse);
  }
}

void attend(const AttendCall& c, const WorkItem& item, void* memory) {
  const Sequence& seq = c.sequences[item.sequence];
  const int dim = c.head_dim, page = c.key.page, rows = (int)(item.token_end - item.token_begin) * c.group;
  Scratch s(c, rows, memory);
  const F factor = f_set(c.scaling * 1.44269504f);  // scores in units of log 2
  for (int r = 0; r < rows; ++r) {
    float* q = s.q + r * dim;
    load_rows(c.q.dtype,
              row_at(c.q, seq.first + item.token_begin + r / c.group, item.kv_head * c.group + r % c.group), dim, q);
    for (int i = 0; i < dim; i += 16) f_store(q + i, f_mul(f_load(q + i), factor));
    s.state.most[r] = kNothing;
    s.state.sum[r] = 0.f;
  }
  memset(s.state.acc, 0, sizeof(float) * rows * dim);
  if (c.key.hadamard) {  // for packed keys alone: the tail is not rotated
    memcpy(s.page_q, s.q, sizeof(float) * rows * dim);
    for (int r = 0; r < rows; ++r) rotate_row(s.page_q + r * dim, dim, c.key.hadamard, s.fold.folded);
  }
  const bool prepared = c.key.bits != 16 && c.key.reduction_groups();
  if (prepared) quantize_rows(s.page_q, dim, rows, dim, c.key.groups(), int16_limit(c.key, c.key.group), s.q16);

  const int64_t packed = seq.packed_end / page, last = item.unit_end < packed ? item.unit_end : packed;
  const int32_t* pages = c.pages + seq.page_begin;
  const int64_t key_bytes = c.key.block_bytes(), value_bytes = c.value.block_bytes();
  for (int64_t u = item.unit_begin; u < last; ++u) {
    const int64_t at = (int64_t)pages[u] * c.kv_heads + item.kv_head;
    const int64_t then = u + 1 < last ? (int64_t)pages[u + 1] * c.kv_heads + item.kv_head : -1;
    memset(s.scores, 0, sizeof(float) * rows * page);
    multiply(c.key, c.k_pages + at * key_bytes, then < 0 ? nullptr : c.k_pages + then * key_bytes, s.page_q, dim, rows,
             prepared ? &s.q16 : nullptr, s.fold, s.scores, page);
    if (u == 0) hide_sinks(c, s.scores, rows);
    for (int r = 0; r < rows; ++r) softmax_row(s.state, r, s.scores + r * page, page);
    multiply(c.value, c.v_pages + at * value_bytes, then < 0 ? nullptr : c.v_pages + then * value_bytes, s.scores, page,
             rows, nullptr, s.fold, s.state.acc, dim);
  }
  if (item.unit_begin == 0 && packed > 0) attend_sinks(c, item, s, pages[0]);
  const int64_t visible_end = seq.prior + item.token_end;
  for (int64_t u = item.unit_begin > packed ? item.unit_begin : packed; u < item.unit_end; ++u) {
    const int64_t begin = seq.packed_end + (u - packed) * kTailTokens, end = begin + kTailTokens;
    attend_tail(c, item, s, begin, end < visible_end ? end : visible_end);
  }
  if (!item.partial) return store_result(c, item, s.state);
  memcpy(item.partial, s.state.acc, sizeof(float) * rows * dim);
  memcpy(item.partial + (int64_t)rows * dim, s.state.most, sizeof(float) * rows);
  memcpy(item.partial + (int64_t)rows * (dim + 1), s.state.sum, sizeof(float) * rows);
}
