// Scores of a run of pages to probabilities, and those made ready for products with the values.
#pragma once

#include <sgl_kernel/kvtuner/cpu/quantized_rows.h>
#include <sgl_kernel/kvtuner/cpu/softmax.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

// A page of scores to probabilities times its scales, in place. total: lanes of the sum of probabilities; largest,
// product: of what becomes of them, and of its products with zero points.
template <bool ASYM>
KVTUNER_INLINE void fold_page(float* s, int count, F maximum, const float* scales, const float* zeros, F& total,
                              F& largest, F& product) {
  for (int i = 0; i < count; i += kLanes) {
    const F p = f_exp2(f_sub(f_load(s + i), maximum));
    const F v = f_mul(p, f_load(scales + i));
    f_store(s + i, v);
    total = f_add(total, p);
    largest = f_peak(largest, v);
    if (ASYM) product = f_fma(v, f_load(zeros + i), product);
  }
}

// Values with one group of channels.
template <bool ASYM>
inline void fold_scores(RunningSoftmax& softmax, int page, int count, float* scores, int stride,
                        const Parameters& parameters, Folding& folding, Fetch& fetch) {
  for (int r = 0; r < softmax.rows; ++r) {
    float* row = scores + (int64_t)r * stride;
    F total, largest = f_set(0.f), product = f_set(0.f);
    const F maximum = raise_maximum(softmax, r, row, count * page, total);
    for (int j = 0; j < count; ++j) {
      fetch.step();
      const int at = j * page;
      usual_count(page, [&](int tokens) KVTUNER_INLINE_LAMBDA {
        fold_page<ASYM>(row + at, tokens, maximum, parameters.scale + at, ASYM ? parameters.zero + at : nullptr, total,
                        largest, product);
      });
    }
    f_store(softmax.running_sum + r * kLanes, total);
    folding.push(row, largest, product);
  }
  folding.finish();
}

// Scores [rows][stride] of `count` pages to what the values of those pages are multiplied by: probabilities relative to
// the maximum, in place, or where a page has scales for its tokens, the rows of `to`. The running softmax is brought up
// to date. spare: [2][kLanes][length of to]. soon, later: what is fetched meanwhile, in soon_steps() and later_steps().
inline void weigh(RunningSoftmax& softmax, const BlockShape& f, const uint8_t* const* blocks, int count, float* scores,
                  int stride, const Parameters& parameters, float* spare, const QuantizedRows& to, Fetch& soon,
                  Fetch& later) {
  const int page = f.reduction;
  if (f.lane_groups()) parameters.load(f, blocks, count);
  Folding folding(f, spare, to, later);
  if (f.lane_groups() && f.groups == 1) {
    if (f.asym) return fold_scores<true>(softmax, page, count, scores, stride, parameters, folding, soon);
    return fold_scores<false>(softmax, page, count, scores, stride, parameters, folding, soon);
  }
  for (int r = 0; r < softmax.rows; ++r) {
    float* row = scores + (int64_t)r * stride;
    softmax_row(softmax, r, row, count * page, page, soon);
    for (int g = 0; f.lane_groups() && g < f.groups; ++g) folding.fold(row, parameters, g * count * page);
  }
  if (f.lane_groups()) return folding.finish();
  for (int j = 0; f.nbits != 16 && j < count; ++j) quantize_rows(f, scores + j * page, stride, softmax.rows, to, j);
}

inline int soon_steps(int rows, int count) { return rows * count; }
inline int later_steps(const BlockShape& f, int rows) { return f.lane_groups() ? rows * f.groups : 0; }

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
