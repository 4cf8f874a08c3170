// Rows times packed blocks.
#pragma once

#include <sgl_kernel/kvtuner/cpu/block_product.h>
#include <sgl_kernel/kvtuner/cpu/quantized_rows.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

template <int BITS>
inline void multiply_codes(const BlockShape& f, const uint8_t* const* blocks, int count, const QuantizedRows& quantized,
                           int copy, int rows, float* out, int out_stride, bool accumulate, Fetch& fetch) {
  const int64_t a_stride = (int64_t)quantized.copies * quantized.length;
  if (!f.reduction_groups) {
    for (int g = 0; g < f.groups; ++g) {
      const int at = copy + g;
      const CodeProduct product{blocks,
                                count,
                                (int64_t)g * f.group_size * kWordBytes,
                                f.step,
                                f.vectors,
                                quantized.element + (int64_t)at * quantized.length,
                                a_stride,
                                quantized.scale + at,
                                quantized.extra + at,
                                quantized.copies,
                                nullptr,
                                nullptr,
                                0,
                                nullptr,
                                nullptr,
                                out + g * f.group_size,
                                out_stride,
                                accumulate};
      cover(rows, f.group_size / kLanes, CodeTiles<BITS, false>{product, fetch});
    }
    return;
  }
  for (int j = 0; j < count; ++j) {
    const uint8_t *scales = blocks[j] + f.code_bytes, *zeros = scales + f.scale_bytes;
    for (int g = 0; g < f.groups; ++g) {
      const int row = copy + j, sum = row * f.groups + g, at = g * f.lanes * kParameterBytes;
      const CodeProduct product{blocks + j,
                                1,
                                (int64_t)g * f.group_vectors * f.step,
                                f.step,
                                f.group_vectors,
                                quantized.element + (int64_t)row * quantized.length + g * f.group_size,
                                a_stride,
                                quantized.scale + row,
                                nullptr,
                                quantized.copies,
                                quantized.sum + sum,
                                quantized.exact + sum,
                                quantized.copies * f.groups,
                                scales + at,
                                f.asym ? zeros + at : nullptr,
                                out,
                                out_stride,
                                accumulate || j > 0 || g > 0};
      cover(rows, f.lanes / kLanes, CodeTiles<BITS, true>{product, fetch});
    }
  }
}

// out[rows][lanes] = or += rows times `count` blocks, whose reductions follow one another. quantized: from its copy
// `copy` on, the rows made ready for these blocks; a: the same as floats.
inline void multiply(const BlockShape& f, const uint8_t* const* blocks, int count, const float* a, int a_stride,
                     const QuantizedRows& quantized, int copy, int rows, float* out, int out_stride, bool accumulate,
                     Fetch& fetch) {
  switch (f.nbits) {
    case 2:
      return multiply_codes<2>(f, blocks, count, quantized, copy, rows, out, out_stride, accumulate, fetch);
    case 4:
      return multiply_codes<4>(f, blocks, count, quantized, copy, rows, out, out_stride, accumulate, fetch);
    case 8:
      return multiply_codes<8>(f, blocks, count, quantized, copy, rows, out, out_stride, accumulate, fetch);
  }
  const FloatProduct product{blocks, count, f.step, f.vectors, a, a_stride, out, out_stride, accumulate};
  cover(rows, f.lanes / kLanes, FloatTiles<16>{product, fetch});
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
