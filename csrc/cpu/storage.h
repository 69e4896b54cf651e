// Conversion between float and fp32, fp16 and bf16 storage, one element at a time.
//
// The conversions use integer arithmetic instead of F16C, AVX512-BF16 or a compiler's _Float16. Every instruction set
// therefore rounds alike (to nearest, ties to even) and agrees with torch bit for bit. All functions have internal
// linkage, because this header is compiled once per instruction set and the linker must not merge the copies.
#pragma once

#include <cstdint>
#include <cstring>

#include "../kernels.h"

namespace fedspine {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float to_float(float value) {
  return value;
}

inline float to_float(BFloat16 value) {
  return float_of(uint32_t{value.bits} << 16);
}

// After the shift the exponent is 112 too small. The multiplication corrects it and normalises subnormals. The
// exponents of infinity and NaN are then filled with ones.
inline float to_float(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t bits = bits_of(float_of(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7c00u) bits |= 0x7f800000u;
  return float_of(bits | (value.bits & 0x8000u) << 16);
}

inline void from_float(float value, float* out) {
  *out = value;
}

inline void from_float(float value, BFloat16* out) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);  // a NaN stays a NaN
    return;
  }
  out->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline void from_float(float value, Half* out) {
  const uint32_t sign = bits_of(value) >> 16 & 0x8000u;
  const uint32_t magnitude = bits_of(value) & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the addition aligns and rounds subnormals
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

// Return the address of element (row, col) of a matrix whose storage type is T.
template <typename T>
inline T* element(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<T*>(m.data) + row * m.row_stride + col * m.col_stride;
}

inline float load(const Matrix& m, int64_t row, int64_t col) {
  switch (m.dtype) {
    case DType::f32:
      return *element<float>(m, row, col);
    case DType::f16:
      return to_float(*element<Half>(m, row, col));
    default:
      return to_float(*element<BFloat16>(m, row, col));
  }
}

inline void store(const Matrix& m, int64_t row, int64_t col, float value) {
  switch (m.dtype) {
    case DType::f32:
      return from_float(value, element<float>(m, row, col));
    case DType::f16:
      return from_float(value, element<Half>(m, row, col));
    default:
      return from_float(value, element<BFloat16>(m, row, col));
  }
}

}  // namespace
}  // namespace fedspine
