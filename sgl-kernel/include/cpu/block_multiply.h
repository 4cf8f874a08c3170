// Rows times a packed block, in two steps, so that the first can be done for several blocks before the second: rows
// become int16 with the scales folded in that lie along the reduction, then tiles of products. Included once per body,
// after block_product.h.
//
// Groups along the lanes have a scale per element of the reduction: it is folded into the rows, anew for each group,
// and zero points add one term per row. Groups along the reduction have a scale per lane: it multiplies the sums after.

// Largest int16 with which a sum over `width` products cannot leave int32.
inline float int16_limit(const BlockFormat& f, int width) {
  const double most = 2147483647.0 / (((1 << f.bits) - 1) * (double)width);
  return most < 32767 ? (float)(int)most : 32767.f;
}

// What the loops need of a format, worked out once per work item.
struct BlockShape {
  int bits, group, lanes, reduction, groups, span;
  bool asym, reduction_groups;
  int code_bytes, scale_bytes, bytes;
  int step;         // bytes from one vector of the reduction to the next
  int fetch_steps;  // steps of the first rows' tiles, among which lines to prefetch are spread
  float limit;      // of the rows' int16

  explicit BlockShape(const BlockFormat& f)
      : bits(f.bits), group(f.group), lanes(f.lanes()), reduction(f.reduction()), groups(f.bits == 16 ? 1 : f.groups()),
        span(f.span()), asym(f.asym), reduction_groups(f.reduction_groups()), code_bytes(f.code_bytes()),
        scale_bytes(f.scale_bytes()), bytes(f.block_bytes()), step(lanes / kLanes * kVectorBytes),
        limit(int16_limit(f, reduction_groups ? group : reduction)) {
    fetch_steps = reduction / span * ((lanes / kLanes + kMaxVectors - 1) / kMaxVectors);
  }
};

// Rows as a block takes them: value = element * scale.
struct Left {
  int16_t* element;  // [copies][rows][reduction]; copies: groups along the lanes, else 1
  float* scale;      // [copies][rows]
  int32_t* sum;      // of the int16, [copies][rows], or [rows][groups along the reduction]
  float* exact;      // of the floats, as sum; of asymmetric blocks with groups along the reduction
  float* extra;      // [copies][rows]: products with zero points; of asymmetric blocks with groups along the lanes

  template <class Carve>
  static Left carve(Carve& memory, const BlockShape& f, int rows) {
    const int groups = f.groups, copies = f.reduction_groups ? 1 : groups;
    return {memory.template take<int16_t>((int64_t)copies * rows * f.reduction), memory.template take<float>(copies * rows),
            memory.template take<int32_t>(rows * groups), memory.template take<float>(rows * groups),
            memory.template take<float>(rows * groups)};
  }
};

inline float largest_of(const float* row, int count) {
  F m = f_set(0.f);
  for (int i = 0; i < count; i += 16) m = f_max(m, f_abs(f_load(row + i)));
  return f_hmax(m);
}

// One group of a row: its int16, and their sum.
inline int32_t quantize(const float* row, int count, float inverse, int16_t* to) {
  if (count % 16) {  // narrow groups of 2- and 4-bit codes
    int32_t sum = 0;
    for (int i = 0; i < count; ++i) sum += to[i] = (int16_t)(int)round_even(row[i] * inverse);
    return sum;
  }
  I sum = i_set(0);
  for (int i = 0; i < count; i += 16) {
    const I q = to_int(f_mul(f_load(row + i), f_set(inverse)));
    store_int16(to + i, q);
    sum = i_add(sum, q);
  }
  return i_hsum(sum);
}

inline float inverse_of(float largest, float limit) { return largest > 1e-30f ? limit / largest : 0.f; }

inline void prepare_reduction_groups(const BlockShape& f, const float* a, int stride, int rows, Left& to) {
  const int reduction = f.reduction, groups = f.groups;
  for (int r = 0; r < rows; ++r) {
    const float* row = a + (int64_t)r * stride;
    const float largest = largest_of(row, reduction), inverse = inverse_of(largest, f.limit);
    to.scale[r] = largest / f.limit;
    for (int g = 0; g < groups; ++g)
      to.sum[r * groups + g] = quantize(row + g * f.group, f.group, inverse, to.element + r * reduction + g * f.group);
    if (!f.asym) continue;
    for (int g = 0; g < groups; ++g) {
      float sum = 0.f;
      for (int i = g * f.group; i < (g + 1) * f.group; ++i) sum += row[i];
      to.exact[r * groups + g] = sum;
    }
  }
}

// A row times the scales along it, as int16. N: vectors of the row, so that it stays in registers.
template <int N>
inline void fold_row(const BlockShape& f, const float* row, const uint8_t* scales, const uint8_t* zeros, Left& to, int at) {
  F x[N], most = f_set(0.f), extra = f_set(0.f);
  KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
    x[n] = f_mul(f_load(row + n * kLanes), load_half(scales + n * 32));
    most = f_max(most, f_abs(x[n]));
    if (f.asym) extra = f_fma(x[n], load_int16(zeros + n * 32), extra);
  }
  const float largest = f_hmax(most);
  const F inverse = f_set(inverse_of(largest, f.limit));
  I sum = i_set(0);
  KVTUNER_UNROLL for (int n = 0; n < N; ++n) {
    const I q = to_int(f_mul(x[n], inverse));
    store_int16(to.element + (int64_t)at * N * kLanes + n * kLanes, q);
    sum = i_add(sum, q);
  }
  to.scale[at] = largest / f.limit;
  to.sum[at] = i_hsum(sum);
  if (f.asym) to.extra[at] = f_hsum(extra);
}

inline void prepare_lane_groups(const BlockShape& f, const uint8_t* block, const float* a, int stride, int rows,
                                float* folded, Left& to) {
  const int reduction = f.reduction;
  const uint8_t* scales = block + f.code_bytes;
  const uint8_t* zeros = scales + f.scale_bytes;
  for (int g = 0; g < f.groups; ++g, scales += reduction * 2, zeros += reduction * 2)
    for (int r = 0; r < rows; ++r) {
      const float* row = a + (int64_t)r * stride;
      const int at = g * rows + r;
      if (reduction == 4 * kLanes) {
        fold_row<4>(f, row, scales, zeros, to, at);
        continue;
      }
      F extra = f_set(0.f);
      for (int i = 0; i < reduction; i += kLanes) {
        const F x = f_mul(f_load(row + i), load_half(scales + i * 2));
        f_store(folded + i, x);
        if (f.asym) extra = f_fma(x, load_int16(zeros + i * 2), extra);
      }
      const float largest = largest_of(folded, reduction);
      to.scale[at] = largest / f.limit;
      to.sum[at] = quantize(folded, reduction, inverse_of(largest, f.limit), to.element + (int64_t)at * reduction);
      if (f.asym) to.extra[at] = f_hsum(extra);
    }
}

// Makes rows ready for a block; for groups along the reduction the result serves every block. folded: [reduction].
inline void prepare(const BlockShape& f, const uint8_t* block, const float* a, int stride, int rows, float* folded,
                    Left& to) {
  if (f.bits == 16) return;
  if (f.reduction_groups)
    prepare_reduction_groups(f, a, stride, rows, to);
  else
    prepare_lane_groups(f, block, a, stride, rows, folded, to);
}

template <int BITS>
inline void multiply_codes(const BlockShape& f, const uint8_t* block, const Left& left, int rows, float* out,
                           int out_stride, bool accumulate, Prefetch* later) {
  const int lanes = f.lanes, reduction = f.reduction, groups = f.groups, step = f.step;
  const uint8_t* scales = block + f.code_bytes;
  const uint8_t* zeros = scales + f.scale_bytes;
  for (int g = 0; g < groups; ++g) {
    if (f.reduction_groups) {
      const int vectors = f.group / f.span, at = g * lanes * 2;
      const Epilogue e{left.scale, left.sum + g, left.exact + g, nullptr, groups, scales + at,
                       f.asym ? zeros + at : nullptr, accumulate || g > 0};
      cover(rows, lanes / kLanes,
            CodeTile<BITS>{block + (int64_t)g * vectors * step, step, vectors, left.element + g * f.group, reduction, e,
                           out, out_stride, later});
    } else {
      const int at = g * rows;
      const Epilogue e{left.scale + at, left.sum + at, nullptr, f.asym ? left.extra + at : nullptr, 1, nullptr, nullptr,
                       accumulate};
      cover(rows, f.group / kLanes,
            CodeTile<BITS>{block + (int64_t)g * f.group / kLanes * kVectorBytes, step, reduction / f.span,
                           left.element + (int64_t)at * reduction, reduction, e, out + g * f.group, out_stride, later});
    }
  }
}

// out[rows][lanes] = or += rows times the block. a: the floats that `left` was prepared from. later: a block that is
// read some time after this one, with its size, or null.
inline void multiply(const BlockShape& f, const uint8_t* block, const float* a, int a_stride, const Left& left, int rows,
                     float* out, int out_stride, bool accumulate, const uint8_t* later, int later_bytes) {
  const int steps = f.fetch_steps, lines = (later_bytes + kVectorBytes - 1) / kVectorBytes;
  Prefetch fetch{later, later ? lines / steps : 0}, *next = &fetch;
  if (later) fetch.fetch(lines % steps);
  switch (f.bits) {
    case 2: return multiply_codes<2>(f, block, left, rows, out, out_stride, accumulate, next);
    case 4: return multiply_codes<4>(f, block, left, rows, out, out_stride, accumulate, next);
    case 8: return multiply_codes<8>(f, block, left, rows, out, out_stride, accumulate, next);
  }
  cover(rows, f.lanes / kLanes,
        FloatTile<16>{block, f.step, f.reduction / 2, a, a_stride, out, out_stride,
                      accumulate, next});
}
