// Quantizes and packs one page of one head. Included once per body; loops over neighbours vectorize by themselves.

inline void pack_bf16(const BlockFormat& f, const float* x, uint8_t* block) {
  for (int t = 0; t < f.page; ++t)
    for (int c = 0; c < f.head_dim; ++c) {
      const int r = f.token_lanes ? c : t, l = f.token_lanes ? t : c;
      const uint16_t h = bf16_of(x[t * f.head_dim + c]);
      memcpy(block + (r / 2 * (f.lanes() / kLanes) + l / kLanes) * kVectorBytes + l % kLanes * 4 + r % 2 * 2, &h, 2);
    }
}

inline void code_rows_per_token(const BlockFormat& f, const float* x, uint16_t* scales, int16_t* zeros,
                                uint8_t* codes) {
  const int offset = f.offset();
  for (int t = 0; t < f.page; ++t)
    for (int g = 0; g < f.groups(); ++g) {
      const float* row = x + t * f.head_dim + g * f.group;
      float low = row[0], high = row[0];
      for (int i = 1; i < f.group; ++i) {
        low = row[i] < low ? row[i] : low;
        high = row[i] > high ? row[i] : high;
      }
      uint16_t half;
      int16_t z = 0;
      group_parameters(f, low, high, &half, &z);
      scales[g * f.page + t] = half;
      if (f.asym) zeros[g * f.page + t] = z;
      const float scale = scale_of_half(half), zero = z;
      uint8_t* to = codes + t * f.head_dim + g * f.group;
      for (int i = 0; i < f.group; ++i) to[i] = code_of(row[i], scale, zero, offset);
    }
}

inline void code_rows_per_channel(const BlockFormat& f, const float* x, uint16_t* scales, int16_t* zeros,
                                  uint8_t* codes) {
  const int offset = f.offset(), dim = f.head_dim;
  for (int g = 0; g < f.groups(); ++g) {
    for (int from = 0; from < dim; from += kLanes) {
      const float* first = x + g * f.group * dim + from;
      float low[kLanes], high[kLanes], scale[kLanes], zero[kLanes];
      for (int i = 0; i < kLanes; ++i) low[i] = high[i] = first[i];
      for (int t = 1; t < f.group; ++t)
        for (int i = 0; i < kLanes; ++i) {
          const float y = first[t * dim + i];
          low[i] = y < low[i] ? y : low[i];
          high[i] = y > high[i] ? y : high[i];
        }
      for (int i = 0; i < kLanes; ++i) {
        uint16_t half;
        int16_t z = 0;
        group_parameters(f, low[i], high[i], &half, &z);
        scales[g * dim + from + i] = half;
        if (f.asym) zeros[g * dim + from + i] = z;
        scale[i] = scale_of_half(half);
        zero[i] = z;
      }
      for (int t = 0; t < f.group; ++t)
        for (int i = 0; i < kLanes; ++i)
          codes[(g * f.group + t) * dim + from + i] = code_of(first[t * dim + i], scale[i], zero[i], offset);
    }
  }
}

void pack(const BlockFormat& f, float* x, uint8_t* block, uint8_t* codes) {
  if (f.hadamard)
    for (int t = 0; t < f.page; ++t) rotate_row(x + t * f.head_dim, f.head_dim, f.hadamard, (float*)codes);
  if (f.bits == 16) return pack_bf16(f, x, block);
  uint16_t* scales = (uint16_t*)(block + f.code_bytes());
  int16_t* zeros = (int16_t*)(block + f.code_bytes() + f.scale_bytes());
  (f.axis == 0 ? code_rows_per_token : code_rows_per_channel)(f, x, scales, zeros, codes);
  const int span = f.span(), dim = f.head_dim;
  const int reduction_stride = f.token_lanes ? 1 : dim, lane_stride = f.token_lanes ? dim : 1;
  for (int v = 0; v < f.reduction() / span; ++v)
    for (int l = 0; l < f.lanes(); ++l) {
      const uint8_t* from = codes + v * span * reduction_stride + l * lane_stride;
      uint32_t lane = 0;
      for (int e = 0; e < span; ++e) lane |= (uint32_t)from[e * reduction_stride] << (e / 2 * f.bits + e % 2 * 16);
      memcpy(block + (v * f.lanes() + l) * 4, &lane, 4);
    }
}
