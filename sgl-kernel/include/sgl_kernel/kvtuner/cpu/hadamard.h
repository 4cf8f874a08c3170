// The rotation of keys and queries along head_dim: an orthonormal Walsh-Hadamard transform of every `block` neighbours
// (a power of two). The loops vectorize by themselves.
//
// The reference in torch is hadamard.py; both add in the same order, so that packed bytes are equal.
#pragma once

#include <sgl_kernel/kvtuner/cpu/simd.h>

namespace kvtuner::KVTUNER_ISA {
namespace {

// Sends the sum and the difference of the pair (2 i, 2 i + 1) to i and i + half: the pairs are neighbours in every
// pass, and all passes together bring each element back to its place.
inline void hadamard_pass(const float* __restrict__ from, float* __restrict__ to, int half) {
  for (int i = 0; i < half; ++i) {
    to[i] = from[2 * i] + from[2 * i + 1];
    to[i + half] = from[2 * i] - from[2 * i + 1];
  }
}

// In place; spare: `block` floats.
inline void rotate_row(float* x, int count, int block, float* spare) {
  float scale = 1.f;
  for (int b = block; b > 1; b /= 4) scale *= b == 2 ? 0.70710678f : 0.5f;
  for (int at = 0; at < count; at += block) {
    float *from = x + at, *to = spare;
    for (int distance = 1; distance < block; distance *= 2) {
      hadamard_pass(from, to, block / 2);
      float* written = to;
      to = from, from = written;
    }
    for (int i = 0; i < block; ++i) x[at + i] = from[i] * scale;
  }
}

}  // namespace
}  // namespace kvtuner::KVTUNER_ISA
