// One work item of attention: online softmax over runs of packed pages, then over full-precision tiles. Included once
// per body, last.

// Pages whose scores are computed before their values are read: what a page waits for (maxima, sums, roundings)
// overlaps with the others'. With many rows there is work enough in one. The blocks of a run, fetched ahead of use, must
// not push each other out of the first-level cache.
constexpr int kRunPages = 4;
constexpr int kRunRows = 16;
constexpr int kRunBytes = 36 << 10;

// The share of a block's lines that is fetched outside of tiles: maxima, exponents and roundings take about as much of the
// time.
constexpr int kRestShare = 4;

inline int run_pages(const AttendCall& c, int rows) {
  const int fit = kRunBytes / (c.key.block_bytes() + c.value.block_bytes());
  return rows > kRunRows || fit < 1 ? 1 : fit < kRunPages ? fit : kRunPages;
}

struct Scratch {
  float *q, *page_q, *scores, *folded;  // page_q: rotated where packed keys are
  Left keys, values;
  TailScratch tail;
  State state;
  BlockShape key, value;
  int run;
  int64_t bytes;

  Scratch(const AttendCall& c, int rows, void* memory)
      : key(c.key), value(c.value), run(run_pages(c, rows)) {
    Carver carve{(char*)memory};
    const int dim = c.head_dim, page = c.key.page, tokens = page * run > kTailTokens ? page * run : kTailTokens;
    q = carve.take<float>(rows * dim);
    page_q = c.key.hadamard ? carve.take<float>(rows * dim) : q;
    scores = carve.take<float>(rows * tokens);
    folded = carve.take<float>(kLanes * (page > dim ? page : dim));
    keys = Left::carve(carve, key, rows, keys_once() ? 1 : run);
    values = Left::carve(carve, value, rows, run);
    tail = {scores, carve.take<float>(kTailTokens * dim), carve.take<float>(kTailTokens * dim),
            carve.take<float>(kTailTokens * dim)};
    state = {rows, dim, carve.take<float>(rows * dim), carve.take<float>(rows), carve.take<float>(rows * kLanes)};
    bytes = carve.used;
  }

  // Queries serve every page as they are.
  bool keys_once() const { return key.bits == 16 || key.reduction_groups; }
};

// What an item of the call needs at most.
int64_t scratch_bytes(const AttendCall& c) {
  const int most = (int)row_limit(c.group), few = most < kRunRows ? most : kRunRows;
  const int64_t a = Scratch(c, most, nullptr).bytes, b = Scratch(c, few, nullptr).bytes;
  return a > b ? a : b;
}

inline void load_queries(const AttendCall& c, const WorkItem& item, Scratch& s) {
  const int rows = s.state.rows, dim = c.head_dim;
  const F factor = f_set(c.scaling * 1.44269504f);  // scores in units of log 2
  for (int r = 0; r < rows; ++r) {
    const int64_t row = c.sequences[item.sequence].first + item.token_begin + r / c.group;
    float* q = s.q + r * dim;
    load_rows(c.q.dtype, c.q.at(row, item.kv_head * c.group + r % c.group), dim, q);
    for (int i = 0; i < dim; i += 16) f_store(q + i, f_mul(f_load(q + i), factor));
    s.state.most[r] = kNothing;
  }
  memset(s.state.sums, 0, sizeof(float) * rows * kLanes);
  memset(s.state.acc, 0, sizeof(float) * rows * dim);
}

inline void attend_pages(const AttendCall& c, const WorkItem& item, Scratch& s, int64_t last) {
  if (item.unit_begin >= last) return;
  const int rows = s.state.rows, dim = c.head_dim, page = c.key.page, stride = s.run * page;
  const int32_t* pages = c.pages + c.sequences[item.sequence].page_begin;
  const auto block_of = [&](const uint8_t* blocks, const BlockShape& f, int64_t u) {
    return blocks + ((int64_t)pages[u] * c.kv_heads + item.kv_head) * f.bytes;
  };
  const int key_lines = s.key.lines(), value_lines = s.value.lines();
  const int value_tile_lines = value_lines - value_lines / kRestShare;
  const int key_tile_lines = fetching_steps(s.value, rows, 1) ? key_lines - key_lines / kRestShare : key_lines;
  PrefetchRest none;
  for (int64_t u = item.unit_begin; u < last && u < item.unit_begin + s.run; ++u)
    Prefetch{block_of(c.k_pages, s.key, u), 0}.fetch(key_lines);
  if (c.key.hadamard) {
    memcpy(s.page_q, s.q, sizeof(float) * rows * dim);
    for (int r = 0; r < rows; ++r) rotate_row(s.page_q + r * dim, dim, c.key.hadamard, s.folded);
  }
  const bool keys_once = s.keys_once();
  if (keys_once) prepare(s.key, nullptr, 1, s.page_q, dim, 0, rows, s.folded, s.keys, none);
  for (int64_t u = item.unit_begin; u < last; u += s.run) {
    const int count = (int)(last - u < s.run ? last - u : s.run);
    const uint8_t *keys[kRunPages], *values[kRunPages], *next_keys[kRunPages];
    for (int j = 0; j < count; ++j) {
      keys[j] = block_of(c.k_pages, s.key, u + j);
      values[j] = block_of(c.v_pages, s.value, u + j);
      next_keys[j] = u + s.run + j < last ? block_of(c.k_pages, s.key, u + s.run + j) : nullptr;
    }
    if (!keys_once) prepare(s.key, keys, count, s.page_q, dim, 0, rows, s.folded, s.keys, none);
    for (int j = 0; j < count; ++j)
      multiply(s.key, keys[j], s.page_q, dim, s.keys.of_block(s.key, rows, keys_once ? 0 : j), rows, s.scores + j * page,
               stride, false, values[j], value_tile_lines);
    if (u == 0) hide_sinks(c, s.scores, rows, stride);
    PrefetchRest value_rest{values, count, value_tile_lines, value_lines, softmax_steps(rows, count * page)};
    for (int r = 0; r < rows; ++r) softmax_row(s.state, r, s.scores + r * stride, count * page, value_rest);
    int next = 0;
    while (next < count && next_keys[next]) ++next;
    PrefetchRest key_rest{next_keys, next, key_tile_lines, key_lines, fetching_steps(s.value, rows, count)};
    prepare(s.value, values, count, s.scores, stride, page, rows, s.folded, s.values, key_rest);
    for (int j = 0; j < count; ++j)
      multiply(s.value, values[j], s.scores + j * page, stride, s.values.of_block(s.value, rows, j), rows, s.state.acc, dim,
               true, next_keys[j], key_tile_lines);
  }
}

inline void store_result(const AttendCall& c, const WorkItem& item, const State& st) {
  if (item.partial) {
    float* to = item.partial;
    memcpy(to, st.acc, sizeof(float) * st.rows * st.head_dim);
    memcpy(to + (int64_t)st.rows * st.head_dim, st.most, sizeof(float) * st.rows);
    for (int r = 0; r < st.rows; ++r) to[(int64_t)st.rows * (st.head_dim + 1) + r] = st.sum(r);
    return;
  }
  const Sequence& seq = c.sequences[item.sequence];
  for (int r = 0; r < st.rows; ++r) {
    const int64_t row = seq.first + item.token_begin + r / c.group, head = item.kv_head * c.group + r % c.group;
    store_out(c, row, head, st.acc + (int64_t)r * st.head_dim, 1.f / st.sum(r));
  }
}

void attend(const AttendCall& c, const WorkItem& item, void* memory) {
  const Sequence& seq = c.sequences[item.sequence];
  Scratch s(c, (int)(item.token_end - item.token_begin) * c.group, memory);
  load_queries(c, item, s);
  const int64_t packed = seq.packed_end / c.key.page;
  attend_pages(c, item, s, item.unit_end < packed ? item.unit_end : packed);
  if (item.unit_begin == 0 && packed > 0) attend_sinks(c, item, s.q, s.state, s.tail);
  const int64_t visible_end = seq.prior + item.token_end;
  for (int64_t u = item.unit_begin > packed ? item.unit_begin : packed; u < item.unit_end; ++u) {
    const int64_t begin = seq.packed_end + (u - packed) * kTailTokens, end = begin + kTailTokens;
    attend_tail(c, item, s.q, s.state, s.tail, begin, end < visible_end ? end : visible_end);
  }
  store_result(c, item, s.state);
}
