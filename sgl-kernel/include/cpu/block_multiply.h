// Rows times a packed block. Included once per body, after block_rows.h.

template <int BITS>
inline void multiply_codes(const BlockShape& f, const uint8_t* block, const Left& left, int rows, float* out,
                           int out_stride, bool accumulate, Prefetch later) {
  const int lanes = f.lanes, reduction = f.reduction, groups = f.groups, step = f.step;
  const uint8_t* scales = block + f.code_bytes;
  const uint8_t* zeros = scales + f.scale_bytes;
  for (int g = 0; g < groups; ++g) {
    if (f.reduction_groups) {
      const int vectors = f.group / f.span, at = g * lanes * 2;
      const Epilogue e{left.scale, nullptr, left.sum + g, left.exact + g, groups, scales + at, f.asym ? zeros + at : nullptr,
                       accumulate || g > 0};
      cover(rows, lanes / kLanes,
            CodeTile<BITS, true>{block + (int64_t)g * vectors * step, step, vectors, left.element + g * f.group, reduction,
                                 e, out, out_stride, later});
    } else {
      const int at = g * rows;
      const Epilogue e{left.scale + at, left.extra + at, nullptr, nullptr, 0, nullptr, nullptr, accumulate};
      cover(rows, f.group / kLanes,
            CodeTile<BITS, false>{block + (int64_t)g * f.group / kLanes * kVectorBytes, step, reduction / f.span,
                                  left.element + (int64_t)at * reduction, reduction, e, out + g * f.group, out_stride,
                                  later});
    }
  }
}

// out[rows][lanes] = or += rows times the block. a: the floats that `left` was prepared from. later: a block of which the
// first `lines` are read some time after this one, or null.
inline void multiply(const BlockShape& f, const uint8_t* block, const float* a, int a_stride, const Left& left, int rows,
                     float* out, int out_stride, bool accumulate, const uint8_t* later, int lines) {
  const int steps = f.steps * ((rows + kMaxRows - 1) / kMaxRows);
  Prefetch fetch{later, later ? lines / steps : 0, later ? lines % steps : 0};
  switch (f.bits) {
    case 2: return multiply_codes<2>(f, block, left, rows, out, out_stride, accumulate, fetch);
    case 4: return multiply_codes<4>(f, block, left, rows, out, out_stride, accumulate, fetch);
    case 8: return multiply_codes<8>(f, block, left, rows, out, out_stride, accumulate, fetch);
  }
  cover(rows, f.lanes / kLanes,
        FloatTile<16>{block, f.step, f.reduction / 2, a, a_stride, out, out_stride,
                      accumulate, fetch});
}
