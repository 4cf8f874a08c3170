// Halves, exactly: to nearest, ties to even.
#include <array>
#include <cmath>

#include <sgl_kernel/kvtuner/cuda/intrinsics.h>

namespace kvtuner::cuda {
namespace {

constexpr uint32_t kNanHalf = 0x7fff;

const std::array<float, 65536>& half_values() {
  static const auto* values = [] {
    auto* x = new std::array<float, 65536>;
    for (uint32_t h = 0; h < 65536; ++h) {
      const int exponent = h >> 10 & 31, fraction = h & 1023;
      float magnitude = std::ldexp((float)(1024 + fraction), exponent - 25);
      if (exponent == 0) magnitude = std::ldexp((float)fraction, -24);
      if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
      (*x)[h] = h & 0x8000 ? -magnitude : magnitude;
    }
    return x;
  }();
  return *values;
}

uint32_t half_of(double x) {
  if (std::isnan(x)) return kNanHalf;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  x = std::fabs(x);
  if (x == 0) return sign;
  if (x >= 65520) return sign | 0x7c00;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last place
  return sign | ((uint32_t)std::nearbyint(std::ldexp(x, -unit)) + ((uint32_t)(unit + 24) << 10));
}

uint32_t bfloat_of(float x) {
  const uint32_t u = bits_of(x);
  if (std::isnan(x)) return 0x7fff;
  return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}

// Numbers win over NaN.
uint32_t half_max(uint32_t a, uint32_t b) {
  const float x = half_values()[a], y = half_values()[b];
  if (std::isnan(x) && std::isnan(y)) return kNanHalf;
  if (std::isnan(y)) return a;
  return x > y ? a : b;
}

}  // namespace

float half_low(uint32_t a) { return half_values()[a & 0xffff]; }
float half_high(uint32_t a) { return half_values()[a >> 16]; }
uint32_t pack_half2(float low, float high) { return half_of(low) | half_of(high) << 16; }
uint32_t pack_bfloat2(float low, float high) { return bfloat_of(low) | bfloat_of(high) << 16; }
uint32_t half2_add(uint32_t a, uint32_t b) {
  return half_of((double)half_low(a) + half_low(b)) | half_of((double)half_high(a) + half_high(b)) << 16;
}
uint32_t half2_multiply(uint32_t a, uint32_t b) {
  return half_of((double)half_low(a) * half_low(b)) | half_of((double)half_high(a) * half_high(b)) << 16;
}
uint32_t half2_max(uint32_t a, uint32_t b) {
  return half_max(a & 0xffff, b & 0xffff) | half_max(a >> 16, b >> 16) << 16;
}
uint32_t half2_of_shorts(uint32_t a) { return half_of((int16_t)(a & 0xffff)) | half_of((int16_t)(a >> 16)) << 16; }

// Subnormal results are flushed.
float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}
float log2_approx(float x) { return std::log2(x); }

}  // namespace kvtuner::cuda
