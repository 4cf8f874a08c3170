// Rows made ready for products with packed blocks: int16, with the scales folded in that lie along the reduction.
//
// Groups along the lanes have a scale per element of the reduction: it is folded into the rows, anew for each group of
// each block, and zero points and the codes' offset add one term per row. Groups along the reduction have a scale per
// lane: it multiplies the sums after, and the rows serve every block.
#pragma once

#include <sgl_kernel/kvtuner/cpu/tile_loops.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

// Largest int16 with which a sum over `width` products cannot leave int32.
inline float int16_limit(int bits, int width) {
  const double most = 2147483647.0 / (((1 << bits) - 1) * (double)width);
  return most < 32767 ? (float)(int)most : 32767.f;
}

// What the loops need of a format, worked out once per work item.
struct BlockShape {
  int nbits, group_size, lanes, reduction, groups;
  bool asym, reduction_groups;
  int code_bytes, scale_bytes, bytes;
  int step;                    // bytes from one vector of the reduction to the next
  int vectors, group_vectors;  // of the reduction, and of a group along it

  explicit BlockShape(const BlockFormat& f)
      : nbits(f.nbits),
        group_size(f.group_size),
        lanes(f.lanes()),
        reduction(f.reduction()),
        groups(f.nbits == 16 ? 1 : f.groups()),
        asym(f.asym),
        reduction_groups(f.reduction_groups()),
        code_bytes(f.code_bytes()),
        scale_bytes(f.scale_bytes()),
        bytes(f.block_bytes()),
        step(f.vector_stride()),
        vectors(reduction / f.span()),
        group_vectors(group_size / f.span()) {}

  bool lane_groups() const { return nbits != 16 && !reduction_groups; }
  int offset() const { return 1 << (nbits - 1); }
  int code_lines() const { return code_bytes / kVectorBytes; }
  int lines() const { return (bytes + kVectorBytes - 1) / kVectorBytes; }
  // Steps of fetching in a product of `rows` rows with a block.
  int steps(int rows) const {
    return vectors * ((lanes / kLanes + kMaxVectors - 1) / kMaxVectors) * ((rows + kMaxRows - 1) / kMaxRows);
  }
};

// Rows as blocks take them: value = element * scale.
struct QuantizedRows {
  int16_t* element;  // [rows][copies][length]
  float* scale;      // [rows][copies]
  float* extra;      // [rows][copies]: products with zero points and offset; of groups along the lanes
  int32_t* sum;      // [rows][copies][groups]: what the codes' offset adds; of groups along the reduction
  float* exact;      // as sum, sums of the floats; of asymmetric blocks with groups along the reduction
  int copies;        // blocks or groups that rows are made ready for apart
  int length;

  // Stores of 16 may pass the end of scale and extra.
  template <class Carve>
  static QuantizedRows carve(Carve& memory, const BlockShape& f, int rows, int copies, int length) {
    const int all = copies * rows, sums = f.reduction_groups ? all * f.groups : 0;
    return {memory.template take<int16_t>((int64_t)all * length),
            memory.template take<float>(all + kLanes),
            memory.template take<float>(all + kLanes),
            memory.template take<int32_t>(sums),
            memory.template take<float>(sums),
            copies,
            length};
  }

  QuantizedRows shaped(int copies, int length) const {
    QuantizedRows other = *this;
    other.copies = copies, other.length = length;
    return other;
  }
};

// Scales and zero points of some blocks with groups along the lanes, as floats, by group, then block.
struct Parameters {
  float *scale, *zero;  // [groups][blocks][reduction]

  template <class Carve>
  static Parameters carve(Carve& memory, const BlockShape& f, int blocks) {
    const int count = f.lane_groups() ? blocks * f.groups * f.reduction : 0;
    return {memory.template take<float>(count), memory.template take<float>(f.asym ? count : 0)};
  }

  void load(const BlockShape& f, const uint8_t* const* blocks, int count) const {
    for (int j = 0; j < count; ++j)
      for (int g = 0; g < f.groups; ++g) {
        const uint8_t *scales = blocks[j] + f.code_bytes + g * f.reduction * kParameterBytes,
                      *zeros = scales + f.scale_bytes;
        const int at = (g * count + j) * f.reduction;
        for (int i = 0; i < f.reduction; i += kLanes) f_store(scale + at + i, load_half(scales + i * kParameterBytes));
        for (int i = 0; f.asym && i < f.reduction; i += kLanes)
          f_store(zero + at + i, load_int16(zeros + i * kParameterBytes));
      }
  }
};

constexpr float kSmallest = 1e-30f;  // a row's largest element, so that it has an inverse

// A row times factor, rounded. Returns lanes that add up to the sum.
KVTUNER_INLINE I quantize_row(const float* row, int count, float factor, int16_t* to) {
  I sum = i_set(0);
  int i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes)
    sum = i_add(sum, store_rounded(to + i, f_load(row + i), f_load(row + i + kLanes), f_set(factor)));
  for (; i < count; i += kLanes) {
    const I rounded = to_int(f_mul(f_load(row + i), f_set(factor)));
    store_int16(to + i, rounded);
    sum = i_add(sum, rounded);
  }
  return sum;
}

// Rows for blocks with groups along the reduction, which are not looked at.
inline void quantize_rows(const BlockShape& f, const float* a, int stride, int rows, const QuantizedRows& to,
                          int copy) {
  const float limit = int16_limit(f.nbits, f.group_size);
  for (int r = 0; r < rows; ++r) {
    const float* row = a + (int64_t)r * stride;
    const int at = r * to.copies + copy;
    int16_t* element = to.element + (int64_t)at * to.length;
    F max_abs = f_set(kSmallest);
    for (int i = 0; i < f.reduction; i += kLanes) max_abs = f_peak(max_abs, f_abs(f_load(row + i)));
    const float largest = f_hpeak(max_abs);
    to.scale[at] = largest / limit;
    quantize_row(row, f.reduction, limit / largest, element);
    for (int g = 0; g < f.groups; ++g) {
      int32_t sum = 0;
      for (int i = g * f.group_size; i < (g + 1) * f.group_size; ++i) sum += element[i];
      to.sum[at * f.groups + g] = -f.offset() * sum;
      float exact = 0.f;
      for (int i = g * f.group_size; f.asym && i < (g + 1) * f.group_size; ++i) exact += row[i];
      if (f.asym) to.exact[at * f.groups + g] = exact;
    }
  }
}

// Rows that scales are folded into, on their way to int16; `to` is filled in the order in which they come. What follows
// from a row's largest element is little work that takes long: it is done for sixteen rows at a time, while the next
// sixteen come in.
class Folding {
 public:
  // spare: [2][kLanes][length of rows], or null where rows are at places of their own.
  Folding(const BlockShape& f, float* spare, const QuantizedRows& to, Fetch& fetch)
      : f_(f), spare_(spare), to_(to), fetch_(fetch), limit_(int16_limit(f.nbits, to.length)) {}

  // A row, the largest magnitudes in it, and lanes of the sum of its products with zero points.
  KVTUNER_INLINE void push(const float* row, F max_abs, F product) {
    row_[half_][pending_] = row, max_abs_[pending_] = max_abs, product_[pending_] = product;
    if (++pending_ == kLanes) turn();
  }

  // A row times the scales from `at` on.
  void fold(const float* row, const Parameters& parameters, int at) {
    if (f_.asym)
      fold<true>(row, parameters.scale + at, parameters.zero + at);
    else
      fold<false>(row, parameters.scale + at, nullptr);
  }

  void finish() {
    if (pending_) turn();
    round(half_ ^ 1);
  }

 private:
  template <bool ASYM>
  KVTUNER_INLINE void fold(const float* row, const float* scales, const float* zeros) {
    float* y = spare_ + (half_ * kLanes + pending_) * to_.length;
    F max_abs = f_set(0.f), product = f_set(0.f);
    for (int i = 0; i < to_.length; i += kLanes) {
      const F v = f_mul(f_load(row + i), f_load(scales + i));
      f_store(y + i, v);
      max_abs = f_peak(max_abs, f_abs(v));
      if (ASYM) product = f_fma(v, f_load(zeros + i), product);
    }
    push(y, max_abs, product);
  }

  void turn() {
    for (int r = pending_; r < kLanes; ++r) max_abs_[r] = product_[r] = f_set(0.f);
    const F largest = f_peak(f_hpeak_each(max_abs_), f_set(kSmallest));
    f_store(inverse_[half_], f_div(f_set(limit_), largest));
    f_store(to_.scale + known_, f_mul(largest, f_set(1.f / limit_)));
    if (f_.asym) f_store(to_.extra + known_, f_hsum_each(product_));
    half_ ^= 1;
    round(half_);
    known_ += pending_;
    pending_ = 0;
  }

  void round(int half) {
    const int count = known_ - done_;
    if (count == 0) return;
    F sum[kLanes];
    for (int r = 0; r < count; ++r) {
      fetch_.step();
      int16_t* element = to_.element + (int64_t)(done_ + r) * to_.length;
      sum[r] = to_float(quantize_row(row_[half][r], to_.length, inverse_[half][r], element));
    }
    for (int r = count; r < kLanes; ++r) sum[r] = f_set(0.f);
    const F by = f_mul(f_load(to_.scale + done_), f_set(-(float)f_.offset()));
    f_store(to_.extra + done_, f_fma(f_hsum_each(sum), by, f_.asym ? f_load(to_.extra + done_) : f_set(0.f)));
    done_ = known_;
  }

  const BlockShape& f_;
  float* spare_;
  const QuantizedRows& to_;
  Fetch& fetch_;
  float limit_;
  F max_abs_[kLanes], product_[kLanes];
  const float* row_[2][kLanes];
  float inverse_[2][kLanes];
  int half_ = 0, pending_ = 0;  // the rows that no factor is known of yet
  int known_ = 0, done_ = 0;    // rows with factors, and those that are rounded
};

// Makes rows ready for every one of `count` blocks, copies by block, then group. For groups along the reduction blocks
// are not looked at, and one copy serves them all. spare: [2][kLanes][reduction].
inline void prepare(const BlockShape& f, const uint8_t* const* blocks, int count, const float* a, int stride, int rows,
                    const Parameters& parameters, float* spare, const QuantizedRows& to) {
  if (f.nbits == 16) return;
  if (f.reduction_groups) return quantize_rows(f, a, stride, rows, to, 0);
  parameters.load(f, blocks, count);
  Fetch none;
  Folding folding(f, spare, to, none);
  for (int r = 0; r < rows; ++r)
    for (int j = 0; j < count; ++j)
      for (int g = 0; g < f.groups; ++g)
        folding.fold(a + (int64_t)r * stride, parameters, (g * count + j) * f.reduction);
  folding.finish();
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
