// Shared-memory tiles of strided matrices of 16-bit elements, for the tensor-core kernels.
#pragma once

#include "common.cuh"
#include "ptx.cuh"

namespace fedspine {
namespace {

// A matrix of 16-bit elements whose rows are contiguous and begin at multiples of 16 bytes, as cp.async requires. Its
// sizes fit 32 bits; 32-bit index arithmetic saves a third of the registers.
struct AlignedRows {
  const uint16_t* data;
  int rows, cols, stride;
};

// The largest number of rows or columns. The margin allows for a tile that extends beyond the matrix.
constexpr int64_t kMaxSize = 2147483647 - 128;

inline bool is_aligned(const Matrix& m) {
  const bool whole_rows = m.row_stride % 8 == 0 || m.rows == 1;
  const bool small = m.row_stride >= 0 && m.row_stride <= kMaxSize;
  return m.col_stride == 1 && whole_rows && small && reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

inline AlignedRows aligned_rows(const Matrix& m) {
  return {static_cast<const uint16_t*>(m.data), static_cast<int>(m.rows), static_cast<int>(m.cols),
          static_cast<int>(m.row_stride)};
}

// Return the padded length of a tile's row, an odd number of 16-byte pieces. Eight rows then lie in different banks,
// both for ldmatrix and for the pairs that the lanes of a fragment read.
__host__ __device__ constexpr int padded(int cols) {
  return cols + 8;
}

// Copy the part of m that begins at (row0, col0) to tile (kRows, padded(kCols)). Elements outside m become 0. The copy
// is asynchronous and belongs to the next group of cp.async; a barrier must follow.
template <int kRows, int kCols, int kThreads>
__device__ inline void copy_tile(uint16_t* tile, const AlignedRows& m, int row0, int col0, int thread = threadIdx.x) {
  static_assert(kCols % 16 == 0, "padded() needs whole 32-byte pieces");
  constexpr int kPieces = kCols / 8;
#pragma unroll
  for (int e = thread; e < kRows * kPieces; e += kThreads) {
    const int row = row0 + e / kPieces, col = col0 + e % kPieces * 8, left = row < m.rows ? m.cols - col : 0;
    const bool inside = left > 0;
    const uint16_t* from = m.data + (inside ? static_cast<int64_t>(row) * m.stride + col : 0);
    cp_async_16(tile + e / kPieces * padded(kCols) + e % kPieces * 8, from, inside ? (left < 8 ? 2 * left : 16) : 0);
  }
}

// The same for any strides, element by element and synchronous. A barrier must follow.
template <int kRows, int kCols, int kThreads>
__device__ inline void copy_tile(uint16_t* tile, const Matrix& m, int row0, int col0, int thread = threadIdx.x) {
  // Neighbouring threads read along the dimension that is contiguous in memory.
  const bool along_rows = m.row_stride == 1 && m.col_stride != 1;
#pragma unroll 1
  for (int e = thread; e < kRows * kCols; e += kThreads) {
    const int i = along_rows ? e % kRows : e / kCols, j = along_rows ? e / kRows : e % kCols;
    const bool inside = row0 + i < m.rows && col0 + j < m.cols;
    tile[i * padded(kCols) + j] = inside ? *element<uint16_t>(m, row0 + i, col0 + j) : uint16_t{0};
  }
}

// Two neighbouring elements of a tile. Reading and writing them together halves the accesses to shared memory.
template <typename T>
struct __align__(4) Pair {
  T first, second;
};

// Load the fragment of a 16 x 16 tile of A (load_a), or of two neighbouring 16 x 8 tiles of B (load_b, in registers 0,
// 1 and 2, 3). Shared memory holds the operand as the product needs it or, with kTransposed, transposed. `at` points to
// the first element of the tile.
template <int kPitch, bool kTransposed>
__device__ inline void load_a(uint32_t (&fragment)[4], const uint16_t* at) {
  const int lane = threadIdx.x % 32;
  if (kTransposed) {
    ldmatrix_transposed(fragment, at + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8);
  } else {
    ldmatrix(fragment, at + lane % 16 * kPitch + lane / 16 * 8);
  }
}

template <int kPitch, bool kTransposed>
__device__ inline void load_b(uint32_t (&fragment)[4], const uint16_t* at) {
  const int lane = threadIdx.x % 32;
  if (kTransposed) {
    ldmatrix(fragment, at + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8);
  } else {
    ldmatrix_transposed(fragment, at + lane % 16 * kPitch + lane / 16 * 8);
  }
}

}  // namespace
}  // namespace fedspine
