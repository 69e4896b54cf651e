// __half: 5 bits of exponent and 10 bits of mantissa, written for clarity instead of speed.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return x.bits & 0x8000 ? -value : value;
}
inline __half __float2half_rn(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7fff};
  if (x == 0.0f) return {sign};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(magnitude, &exponent);               // magnitude in [2^(exponent - 1), 2^exponent)
  const int unit = std::max(exponent, -13) - 11;  // the last place is 2^unit, 2^-24 for subnormals
  const auto places = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));  // to even, up to 2048
  // The sum lets a mantissa that rounds up carry into the exponent.
  return {static_cast<uint16_t>(sign | ((unit + 24) * 1024 + places))};
}
