// The instructions of csrc/cuda/ptx.cuh, lane by lane, as the PTX ISA defines cp.async, ldmatrix and mma.
#include "cuda/ptx.cuh"

namespace fedspine {
namespace {

void copy_16_bytes(void* shared, const void* global, int bytes) {
  for (int i = 0; i < 8; ++i) {
    static_cast<uint16_t*>(shared)[i] = 2 * i < bytes ? static_cast<const uint16_t*>(global)[i] : 0;
  }
}

struct Row {
  uint16_t elements[8];  // this lane's row: row lane % 8 of matrix lane / 8
  uint32_t* fragment;
};

// Register i of a lane: elements (lane / 4, 2 (lane % 4) + {0, 1}) of matrix i, or of its transpose.
template <bool kTranspose>
EMULATED_HARDWARE void distribute(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[2];
      for (int j = 0; j < 2; ++j) {
        const int row = kTranspose ? 2 * (lane % 4) + j : lane / 4, col = kTranspose ? lane / 4 : 2 * (lane % 4) + j;
        pair[j] = static_cast<Row*>(lanes[8 * i + row])->elements[col];
      }
      static_cast<Row*>(lanes[lane])->fragment[i] = pair[0] | pair[1] << 16;
    }
  }
}

template <bool kTranspose>
void load_matrices(uint32_t (&fragment)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) std::abort();
  Row mine = {{}, fragment};
  for (int i = 0; i < 8; ++i) mine.elements[i] = static_cast<const uint16_t*>(row)[i];
  emulated::warp_collective(kTranspose ? "ldmatrix.trans" : "ldmatrix", &mine, distribute<kTranspose>);
}

struct Product {
  float* sum;
  uint32_t a[4], b[2];
};

// Return the exponent of a normal double. Subnormal products of two 16-bit numbers are normal doubles.
int exponent(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  return static_cast<int>(bits >> 52 & 2047) - 1023;
}

double power_of_two(int e) {
  const uint64_t bits = static_cast<uint64_t>(e + 1023) << 52;
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

// Return c plus the sum of eight products, with the largest error that was found on tensor cores of Ampere and Hopper:
// every term is truncated at the last place of the largest one without guard bits, and the sum is truncated to 24 bits.
// M. Fasi, N. Higham, M. Mikaitis, S. Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ CS 7:e330, 2021.
float sum_of_eight(float c, const double (&products)[8]) {
  double exact = c, magnitude = std::fabs(c);
  for (const double x : products) {
    exact += x;
    magnitude = std::max(magnitude, std::fabs(x));
  }
  if (!std::isfinite(exact) || magnitude == 0.0) return static_cast<float>(exact);
  const int unit = exponent(magnitude) - 23;
  double total = std::trunc(c * power_of_two(-unit));
  for (const double x : products) total += std::trunc(x * power_of_two(-unit));
  if (total == 0.0) return 0.0f;
  const int excess = std::max(exponent(total) - 23, 0);
  return static_cast<float>(std::trunc(total * power_of_two(-excess)) * power_of_two(unit + excess));
}

template <typename T>
double half_of(uint32_t pair, int index);
template <>
double half_of<__half>(uint32_t pair, int index) {
  return __half2float(__half{static_cast<uint16_t>(pair >> 16 * index)});
}
template <>
double half_of<__nv_bfloat16>(uint32_t pair, int index) {
  return __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(pair >> 16 * index)});
}

// m16n8k16, with quad = lane / 4 and in_quad = lane % 4. Register i of A holds row quad + 8 (i % 2) and columns
// 2 in_quad + 8 (i / 2) + {0, 1}. Register i of B holds rows 2 in_quad + 8 i + {0, 1} and column quad. Element i of C
// is row quad + 8 (i / 2) and column 2 in_quad + i % 2.
template <typename T>
EMULATED_HARDWARE void multiply(void* const* lanes) {
  double a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* mine = static_cast<const Product*>(lanes[lane]);
    const int quad = lane / 4, in_quad = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) a[quad + 8 * (i % 2)][2 * in_quad + 8 * (i / 2) + j] = half_of<T>(mine->a[i], j);
    }
    for (int i = 0; i < 2; ++i) {
      for (int j = 0; j < 2; ++j) b[2 * in_quad + 8 * i + j][quad] = half_of<T>(mine->b[i], j);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    auto* mine = static_cast<Product*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
      for (int k0 = 0; k0 < 16; k0 += 8) {
        double products[8];
        for (int k = 0; k < 8; ++k) products[k] = a[row][k0 + k] * b[k0 + k][col];
        mine->sum[i] = sum_of_eight(mine->sum[i], products);
      }
    }
  }
}

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Product mine = {sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::warp_collective("mma", &mine, multiply<T>);
}

}  // namespace

void cp_async_16(void* shared, const void* global, int bytes) {
  emulated::async_copy(shared, global, bytes, copy_16_bytes);
}
void cp_async_commit() {
  emulated::async_commit();
}
void cp_async_wait_all_but_one() {
  emulated::async_wait(1);
}
void ldmatrix(uint32_t (&fragment)[4], const void* row) {
  load_matrices<false>(fragment, row);
}
void ldmatrix_transposed(uint32_t (&fragment)[4], const void* row) {
  load_matrices<true>(fragment, row);
}
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  multiply_add<__half>(sum, a, b0, b1);
}
void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  multiply_add<__nv_bfloat16>(sum, a, b0, b1);
}

}  // namespace fedspine
