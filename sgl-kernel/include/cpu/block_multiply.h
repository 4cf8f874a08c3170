// A prepared left side times a packed block. Included once per body, after block_product.h.

inline float int16_limit(const BlockFormat& f, int width) {
  const double most = 2147483647.0 / (((1 << f.bits) - 1) * (double)width);
  return most < 32767 ? (float)(int)most : 32767.f;
}

struct FoldScratch {
  float* folded;  // [rows][reduction]
  float* extra;   // [rows]
  Rows16 rows;
};

// Groups along the reduction: `a` is independent of the block, so that queries are prepared once for all pages.
template <int BITS>
inline void multiply_reduction_groups(const BlockFormat& f, const uint8_t* block, const uint8_t* next, Rows16 a,
                                      int rows, float* out, int out_stride) {
  const int lanes = f.lanes(), reduction = f.reduction(), groups = f.groups(), step = lanes / kLanes * kVectorBytes;
  const int vectors = f.group / f.span();
  const uint8_t* scales = block + f.code_bytes();
  const uint8_t* zeros = scales + f.scale_bytes();
  for (int g = 0; g < groups; ++g) {
    const int64_t at = (int64_t)g * vectors * step;
    const Epilogue e{a.scale, a.sum + g, a.exact + g, nullptr, groups, scales + (int64_t)g * lanes * 2,
                     f.asym ? zeros + (int64_t)g * lanes * 2 : nullptr};
    cover(rows, lanes / kLanes,
          CodeTile<BITS>{block + at, next ? next + at : nullptr, step, vectors, a.element + g * f.group, reduction, e,
                         out, out_stride});
  }
}

template <int BITS>
inline void multiply_lane_groups(const BlockFormat& f, const uint8_t* block, const uint8_t* next, const float* a,
                                 int a_stride, int rows, FoldScratch& scratch, float* out, int out_stride) {
  const int lanes = f.lanes(), reduction = f.reduction(), step = lanes / kLanes * kVectorBytes;
  const uint8_t* scales = block + f.code_bytes();
  const uint8_t* zeros = scales + f.scale_bytes();
  const float limit = int16_limit(f, reduction);
  for (int g = 0; g < f.groups(); ++g) {
    for (int r = 0; r < rows; ++r) {
      F extra = f_set(0.f);
      for (int i = 0; i < reduction; i += 16) {
        const F x = f_mul(f_load(a + (int64_t)r * a_stride + i), load_half(scales + ((int64_t)g * reduction + i) * 2));
        f_store(scratch.folded + r * reduction + i, x);
        if (f.asym) extra = f_fma(x, load_int16(zeros + ((int64_t)g * reduction + i) * 2), extra);
      }
      scratch.extra[r] = f_hsum(extra);
    }
    quantize_rows(scratch.folded, reduction, rows, reduction, 1, limit, scratch.rows);
    const Epilogue e{scratch.rows.scale, scratch.rows.sum, scratch.rows.exact, f.asym ? scratch.extra : nullptr, 1,
                     nullptr, nullptr};
    const int64_t at = (int64_t)g * f.group / kLanes * kVectorBytes;
    cover(rows, f.group / kLanes,
          CodeTile<BITS>{block + at, next ? next + at : nullptr, step, reduction / f.span(), scratch.rows.element,
                         reduction, e, out + g * f.group, out_stride});
  }
}

// out[rows][lanes] += a[rows][reduction] x block. prepared: `a` as int16, for blocks with groups along the reduction;
// null to prepare it here. next: the block that is read after this one, or null.
inline void multiply(const BlockFormat& f, const uint8_t* block, const uint8_t* next, const float* a, int a_stride,
                     int rows, const Rows16* prepared, FoldScratch& scratch, float* out, int out_stride) {
  if (f.bits == 16) {
    const int step = f.lanes() / kLanes * kVectorBytes;
    cover(rows, f.lanes() / kLanes,
          FloatTile<16>{block, next, step, f.reduction() / 2, a, a_stride, out, out_stride});
    return;
  }
  if (next)  // group parameters; the tiles prefetch codes
    for (int i = f.code_bytes(); i < f.block_bytes(); i += kVectorBytes) __builtin_prefetch(next + i, 0, 3);
  if (!f.reduction_groups()) {
    if (f.bits == 2) multiply_lane_groups<2>(f, block, next, a, a_stride, rows, scratch, out, out_stride);
    if (f.bits == 4) multiply_lane_groups<4>(f, block, next, a, a_stride, rows, scratch, out, out_stride);
    if (f.bits == 8) multiply_lane_groups<8>(f, block, next, a, a_stride, rows, scratch, out, out_stride);
    return;
  }
  if (!prepared) {
    quantize_rows(a, a_stride, rows, f.reduction(), f.groups(), int16_limit(f, f.group), scratch.rows);
    prepared = &scratch.rows;
  }
  if (f.bits == 2) multiply_reduction_groups<2>(f, block, next, *prepared, rows, out, out_stride);
  if (f.bits == 4) multiply_reduction_groups<4>(f, block, next, *prepared, rows, out, out_stride);
  if (f.bits == 8) multiply_reduction_groups<8>(f, block, next, *prepared, rows, out, out_stride);
}
