// Rows times packed blocks. Included once per body, after block_rows.h.

template <int BITS>
inline void multiply_codes(const BlockShape& f, const uint8_t* const* blocks, int count, const Left& left, int copy,
                           int rows, float* out, int out_stride, bool accumulate, Fetch& fetch) {
  const int64_t a_stride = (int64_t)left.copies * left.length;
  if (!f.reduction_groups) {
    for (int g = 0; g < f.groups; ++g) {
      const int at = copy + g;
      const CodeProduct product{blocks,
                                count,
                                (int64_t)g * f.group / kLanes * kVectorBytes,
                                f.step,
                                f.vectors,
                                left.element + (int64_t)at * left.length,
                                a_stride,
                                left.scale + at,
                                left.extra + at,
                                left.copies,
                                nullptr,
                                nullptr,
                                0,
                                nullptr,
                                nullptr,
                                out + g * f.group,
                                out_stride,
                                accumulate};
      cover(rows, f.group / kLanes, CodeTiles<BITS, false>{product, fetch});
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
                                left.element + (int64_t)row * left.length + g * f.group,
                                a_stride,
                                left.scale + row,
                                nullptr,
                                left.copies,
                                left.sum + sum,
                                left.exact + sum,
                                left.copies * f.groups,
                                scales + at,
                                f.asym ? zeros + at : nullptr,
                                out,
                                out_stride,
                                accumulate || j > 0 || g > 0};
      cover(rows, f.lanes / kLanes, CodeTiles<BITS, true>{product, fetch});
    }
  }
}

// out[rows][lanes] = or += rows times `count` blocks, whose reductions follow one another. left: from its copy `copy`
// on, the rows made ready for these blocks; a: the same as floats.
inline void multiply(const BlockShape& f, const uint8_t* const* blocks, int count, const float* a, int a_stride,
                     const Left& left, int copy, int rows, float* out, int out_stride, bool accumulate, Fetch& fetch) {
  switch (f.bits) {
    case 2:
      return multiply_codes<2>(f, blocks, count, left, copy, rows, out, out_stride, accumulate, fetch);
    case 4:
      return multiply_codes<4>(f, blocks, count, left, copy, rows, out, out_stride, accumulate, fetch);
    case 8:
      return multiply_codes<8>(f, blocks, count, left, copy, rows, out, out_stride, accumulate, fetch);
  }
  const FloatProduct product{blocks, count, f.step, f.vectors, a, a_stride, out, out_stride, accumulate};
  cover(rows, f.lanes / kLanes, FloatTiles<16>{product, fetch});
}
