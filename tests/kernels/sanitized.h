// Shared by the sanitizer programs: matrices in buffers of exactly the required size, whose values are known without
// the code under test, and a counter of failures.
#pragma once

#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"

namespace fedspine {

inline int failures = 0;

inline void expect(bool condition, const char* what, int64_t rows, int64_t cols, int64_t rank) {
  if (condition) return;
  std::printf("%s is wrong at %lld x %lld, rank %lld\n", what, static_cast<long long>(rows),
              static_cast<long long>(cols), static_cast<long long>(rank));
  ++failures;
}

inline uint32_t seed = 1;
inline float draw() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
}

// A matrix that owns exactly rows * cols elements. With transposed storage its columns are contiguous.
struct Owned {
  std::unique_ptr<unsigned char[]> data;
  std::vector<double> values;  // the values in storage, row by row
  Matrix view;
};

inline Owned make(int64_t rows, int64_t cols, DType dtype, bool transposed) {
  const size_t size = static_cast<size_t>(rows * cols);
  const size_t item = dtype == DType::f32 ? 4 : 2;
  Owned m{std::unique_ptr<unsigned char[]>(new unsigned char[size * item]), std::vector<double>(size), {}};
  m.view = {m.data.get(), rows, cols, transposed ? 1 : cols, transposed ? rows : 1, dtype};
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const int64_t at = i * m.view.row_stride + j * m.view.col_stride;
      if (dtype == DType::f32) {
        const float x = draw();
        reinterpret_cast<float*>(m.data.get())[at] = x;
        m.values[i * cols + j] = x;
      } else {
        // Multiples of 1/8 below 2 are exact in both 16-bit formats. Their bits are computed without the code under
        // test.
        const int eighths = static_cast<int>(draw() * 15.0f);
        const float x = static_cast<float>(eighths) / 8.0f;
        uint32_t bits;
        static_assert(sizeof bits == sizeof x, "");
        __builtin_memcpy(&bits, &x, 4);
        uint16_t half = static_cast<uint16_t>(bits >> 16);
        if (dtype == DType::f16) {
          const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
          half = static_cast<uint16_t>(sign | (magnitude == 0 ? 0u : (magnitude - 0x38000000u) >> 13));
        }
        reinterpret_cast<uint16_t*>(m.data.get())[at] = half;
        m.values[i * cols + j] = x;
      }
    }
  }
  return m;
}

}  // namespace fedspine
