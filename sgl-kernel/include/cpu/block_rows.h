// Rows made ready for products with packed blocks: int16, with the scales folded in that lie along the reduction.
// Included once per body, after block_product.h.
//
// Groups along the lanes have a scale per element of the reduction: it is folded into the rows, anew for each group of
// each block, and zero points and the codes' offset add one term per row. Groups along the reduction have a scale per
// lane: it multiplies the sums after, and the rows serve every block.

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
  int step;     // bytes from one vector of the reduction to the next
  int steps;    // of the tiles that take all lanes for some rows
  float limit;  // of the rows' int16

  explicit BlockShape(const BlockFormat& f)
      : bits(f.bits), group(f.group), lanes(f.lanes()), reduction(f.reduction()), groups(f.bits == 16 ? 1 : f.groups()),
        span(f.span()), asym(f.asym), reduction_groups(f.reduction_groups()), code_bytes(f.code_bytes()),
        scale_bytes(f.scale_bytes()), bytes(f.block_bytes()), step(lanes / kLanes * kVectorBytes),
        limit(int16_limit(f, reduction_groups ? group : reduction)) {
    steps = reduction / span * ((lanes / kLanes + kMaxVectors - 1) / kMaxVectors);
  }

  int lines() const { return (bytes + kVectorBytes - 1) / kVectorBytes; }
};

// Rows as blocks take them: value = element * scale. Copies: one per block and group where groups are along the lanes.
struct Left {
  int16_t* element;  // [copies][rows][reduction]
  float* scale;      // [copies][rows]
  float* extra;      // [copies][rows]: products with zero points and offset; of groups along the lanes
  int32_t* sum;      // [rows][groups] of the int16; of groups along the reduction
  float* exact;      // as sum, of the floats; of asymmetric blocks with groups along the reduction

  // Stores of 16 may pass the end of scale and extra.
  template <class Carve>
  static Left carve(Carve& memory, const BlockShape& f, int rows, int blocks) {
    const int copies = blocks * (f.reduction_groups ? 1 : f.groups), sums = f.reduction_groups ? blocks * rows * f.groups : 0;
    return {memory.template take<int16_t>((int64_t)copies * rows * f.reduction),
            memory.template take<float>(copies * rows + kLanes), memory.template take<float>(copies * rows + kLanes),
            memory.template take<int32_t>(sums), memory.template take<float>(sums)};
  }

  Left of_block(const BlockShape& f, int rows, int block) const {
    const int copies = block * (f.reduction_groups ? 1 : f.groups), sums = block * rows * f.groups;
    return {element + (int64_t)copies * rows * f.reduction, scale + copies * rows, extra + copies * rows, sum + sums,
            exact + sums};
  }
};

constexpr float kSmallest = 1e-30f;  // a row's largest element, so that it has an inverse

// One group of a row: its int16, their sum, and that of the floats.
inline void quantize_group(const float* row, int count, float inverse, int16_t* to, int32_t* sum, float* exact) {
  if (count % kLanes) {  // narrow groups of 2- and 4-bit codes
    *sum = 0, *exact = 0.f;
    for (int i = 0; i < count; ++i) *sum += to[i] = (int16_t)(int)round_even(row[i] * inverse), *exact += row[i];
    return;
  }
  I total = i_set(0);
  F floats = f_set(0.f);
  for (int i = 0; i < count; i += kLanes) {
    const F x = f_load(row + i);
    const I q = to_int(f_mul(x, f_set(inverse)));
    store_int16(to + i, q);
    total = i_add(total, q);
    floats = f_add(floats, x);
  }
  *sum = i_hsum(total);
  *exact = f_hsum(floats);
}

inline void quantize_reduction_groups(const BlockShape& f, const float* a, int stride, int rows, const Left& to) {
  for (int r = 0; r < rows; ++r) {
    const float* row = a + (int64_t)r * stride;
    F most = f_set(kSmallest);
    for (int i = 0; i < f.reduction; i += kLanes) most = f_max(most, f_abs(f_load(row + i)));
    const float largest = f_hmax(most), inverse = f.limit / largest;
    to.scale[r] = largest / f.limit;
    for (int g = 0, at = r * f.groups; g < f.groups; ++g, ++at)
      quantize_group(row + g * f.group, f.group, inverse, to.element + r * f.reduction + g * f.group, to.sum + at,
                     to.exact + at);
  }
}

// Rows on their way to int16, one lane each in what is worked out for all of them at once.
struct Folding {
  const BlockShape& f;
  float* x;  // [kLanes][reduction]: rows times scales
  PrefetchRest& later;
  F most[kLanes], extra[kLanes];
  int pending, done;

  template <bool ASYM, int R>
  void fold(const float* a, int stride, const uint8_t* scales, const uint8_t* zeros) {
    const int reduction = f.reduction;
    F high[R], product[R];
    KVTUNER_UNROLL for (int r = 0; r < R; ++r) high[r] = product[r] = f_set(0.f);
    float* to = x + pending * reduction;
    later.step();
    for (int i = 0; i < reduction; i += kLanes) {
      const F scale = load_half(scales + i * 2), zero = ASYM ? load_int16(zeros + i * 2) : f_set(0.f);
      KVTUNER_UNROLL for (int r = 0; r < R; ++r) {
        const F y = f_mul(f_load(a + r * stride + i), scale);
        f_store(to + r * reduction + i, y);
        high[r] = f_max(high[r], f_abs(y));
        if (ASYM) product[r] = f_fma(y, zero, product[r]);
      }
    }
    KVTUNER_UNROLL for (int r = 0; r < R; ++r) most[pending + r] = high[r], extra[pending + r] = product[r];
    pending += R;
  }

  template <bool ASYM>
  void fold_rows(const float* a, int stride, int rows, const uint8_t* scales, const uint8_t* zeros, const Left& to) {
    for (int r = 0; r < rows;) {
      const int left = rows - r, room = kLanes - pending, now = left < room ? left : room;
      const float* from = a + (int64_t)r * stride;
      switch (now) {
        case 1: r += 1, fold<ASYM, 1>(from, stride, scales, zeros); break;
        case 2: r += 2, fold<ASYM, 2>(from, stride, scales, zeros); break;
        case 3: r += 3, fold<ASYM, 3>(from, stride, scales, zeros); break;
        default: r += 4, fold<ASYM, 4>(from, stride, scales, zeros);
      }
      if (pending == kLanes) finish(to);
    }
  }

  void finish(const Left& to) {
    if (pending == 0) return;
    for (int r = pending; r < kLanes; ++r) most[r] = extra[r] = f_set(0.f);
    const int reduction = f.reduction;
    const F largest = f_max(f_hmax_each(most), f_set(kSmallest)), limit = f_set(f.limit);
    const F scale = f_mul(largest, f_set(1.f / f.limit));
    float inverse[kLanes];
    f_store(inverse, f_div(limit, largest));
    f_store(to.scale + done, scale);
    F offset[kLanes];
    for (int r = 0; r < pending; ++r) {
      const F factor = f_set(inverse[r]);
      const float* row = x + r * reduction;
      int16_t* element = to.element + (int64_t)(done + r) * reduction;
      I sum = i_set(0);
      int i = 0;
      for (; i + 2 * kLanes <= reduction; i += 2 * kLanes)
        sum = i_add(sum, store_rounded(element + i, f_load(row + i), f_load(row + i + kLanes), factor));
      for (; i < reduction; i += kLanes) {
        const I rounded = to_int(f_mul(f_load(row + i), factor));
        store_int16(element + i, rounded);
        sum = i_add(sum, rounded);
      }
      offset[r] = to_float(sum);
    }
    for (int r = pending; r < kLanes; ++r) offset[r] = f_set(0.f);
    const F by = f_mul(scale, f_set(-(float)(1 << (f.bits - 1))));
    f_store(to.extra + done, f_fma(f_hsum_each(offset), by, f.asym ? f_hsum_each(extra) : f_set(0.f)));
    done += pending;
    pending = 0;
  }
};

// Steps of fetching while rows are made ready for `count` blocks.
inline int fetching_steps(const BlockShape& f, int rows, int count) {
  return f.bits == 16 || f.reduction_groups ? 0 : count * f.groups * ((rows + 3) / 4);
}

// Makes rows ready for `count` blocks. For groups along the reduction blocks are not looked at: one serves all that are
// multiplied by the same rows. Block j takes the rows from a + j * block_step. spare: [kLanes][reduction].
inline void prepare(const BlockShape& f, const uint8_t* const* blocks, int count, const float* a, int stride,
                    int block_step, int rows, float* spare, const Left& to, PrefetchRest& later) {
  if (f.bits == 16) return;
  if (f.reduction_groups) {
    for (int j = 0; j < count; ++j) quantize_reduction_groups(f, a + j * block_step, stride, rows, to.of_block(f, rows, j));
    return;
  }
  Folding folding{f, spare, later};
  for (int j = 0; j < count; ++j)
    for (int g = 0; g < f.groups; ++g) {
      const uint8_t* scales = blocks[j] + f.code_bytes + g * f.reduction * 2;
      const float* from = a + j * block_step;
      if (f.asym)
        folding.fold_rows<true>(from, stride, rows, scales, scales + f.scale_bytes, to);
      else
        folding.fold_rows<false>(from, stride, rows, scales, nullptr, to);
    }
  folding.finish(to);
}
