// The low-rank products of lora_linear on tensor cores, for operands of one 16-bit format. Sums are fp32.
//
// A block of four warps computes one tile of the result, kDepth elements of the inner dimension per step. While a step
// is computed, cp.async copies the operands of the next one. Memory traffic in bytes and arithmetic, for elements of 2
// bytes and the small dimension r:
//   expand    out (m, n) read and written, L once per 64 columns, R once per 64 rows: 4 m n + m n r / 16; 2 r m n FLOPs
//   project   X (m, k) once per 64 ranks (16 if r <= 16), S once per 64 rows: 2 m k + m k r / 32; 2 r m k FLOPs
//   gradient  X (m, n) likewise, L once per 64 columns: 2 m n + m n r / 32; 2 r m n FLOPs
// At r = 16 that is 6.4 FLOPs per byte for expand and 13 for the others, a fifteenth of what tensor cores can execute
// while memory is read (about 200 FLOPs per byte on H200, 210 on Orin). The kernel is bound by memory bandwidth for
// every rank up to 256.
#pragma once

#include "smem_tiles.cuh"

namespace fedspine {
namespace {

constexpr int kLoraLinearMmaThreads = 128;  // four warps

// A matrix as it is stored, which may be the transpose of what the product needs. An aligned one is read 16 bytes at a
// time; the branch is the same for all threads of a launch.
struct Operand {
  Matrix matrix;
  AlignedRows rows;
  bool aligned;
};

template <int kRows, int kCols>
__device__ inline void copy_operand(uint16_t* tile, const Operand& from, int row0, int col0) {
  if (from.aligned) {
    copy_tile<kRows, kCols, kLoraLinearMmaThreads>(tile, from.rows, row0, col0);
  } else {
    copy_tile<kRows, kCols, kLoraLinearMmaThreads>(tile, from.matrix, row0, col0);
  }
}

// Write a tile back to the matrix, 16 bytes at a time if it is aligned.
template <int kRows, int kCols>
__device__ inline void write_tile(const Operand& to, const uint16_t* tile, int row0, int col0) {
  const Matrix& m = to.matrix;
  if (!to.aligned) {
    for (int e = threadIdx.x; e < kRows * kCols; e += kLoraLinearMmaThreads) {
      const int i = e / kCols, j = e % kCols;
      if (row0 + i < m.rows && col0 + j < m.cols) {
        *element<uint16_t>(m, row0 + i, col0 + j) = tile[i * padded(kCols) + j];
      }
    }
    return;
  }
#pragma unroll
  for (int e = threadIdx.x; e < kRows * kCols / 8; e += kLoraLinearMmaThreads) {
    const int i = e / (kCols / 8), j = e % (kCols / 8) * 8, row = row0 + i, col = col0 + j;
    if (row >= m.rows || col >= m.cols) continue;
    const uint16_t* from = tile + i * padded(kCols) + j;
    uint16_t* out = static_cast<uint16_t*>(m.data) + static_cast<int64_t>(row) * to.rows.stride + col;
    if (col + 8 <= m.cols) {
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int k = 0; col + k < m.cols; ++k) out[k] = from[k];
    }
  }
}

// Compute out += alpha left right with kAccumulate, which requires `out` to have type T. Otherwise compute
// partial[slice] = left right over slice blockIdx.z of the inner dimension, or out = alpha left right if there is only
// one slice. left is (rows, depth), stored transposed with kLeftTransposed; right is (depth, cols), stored transposed
// with kRightTransposed.
template <typename T, int kTileRows, int kTileCols, int kDepth, bool kLeftTransposed, bool kRightTransposed,
          bool kAccumulate>
__global__ void __launch_bounds__(kLoraLinearMmaThreads)
    lora_linear_mma(Operand out, Operand left, Operand right, int depth, float alpha, int slice_depth, float* partial) {
  constexpr int kWarpRows = kTileRows / 16, kWarpCols = 4 / kWarpRows;  // arrangement of the four warps
  constexpr int kMmaCols = kTileCols / kWarpCols / 8;                   // mma tiles of 8 columns per warp
  static_assert(kWarpRows * kWarpCols == 4 && kMmaCols % 2 == 0, "four warps of 16 rows and an even number of tiles");
  constexpr int kLeftRows = kLeftTransposed ? kDepth : kTileRows, kLeftCols = kLeftTransposed ? kTileRows : kDepth;
  constexpr int kRightRows = kRightTransposed ? kTileCols : kDepth, kRightCols = kRightTransposed ? kDepth : kTileCols;
  struct __align__(16) Tiles {
    uint16_t left[2][kLeftRows][padded(kLeftCols)];
    uint16_t right[2][kRightRows][padded(kRightCols)];
    uint16_t out[kAccumulate ? kTileRows : 1][padded(kTileCols)];
  };
  FEDSPINE_SHARED(Tiles, tiles);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4, lane_in_quad = lane % 4;
  const int warp_row = warp % kWarpRows * 16, warp_col = warp / kWarpRows * (kTileCols / kWarpCols);
  const int row0 = blockIdx.x * kTileRows, col0 = blockIdx.y * kTileCols;
  const int begin = blockIdx.z * slice_depth, end = depth - begin < slice_depth ? depth : begin + slice_depth;

  const auto fetch = [&](int k0, int stage) {
    copy_operand<kLeftRows, kLeftCols>(tiles.left[stage][0], left, kLeftTransposed ? k0 : row0,
                                       kLeftTransposed ? row0 : k0);
    copy_operand<kRightRows, kRightCols>(tiles.right[stage][0], right, kRightTransposed ? col0 : k0,
                                         kRightTransposed ? k0 : col0);
  };
  float sums[kMmaCols][4] = {};
  if (kAccumulate) copy_operand<kTileRows, kTileCols>(tiles.out[0], out, row0, col0);
  if (begin < end) fetch(begin, 0);
  cp_async_commit();
  int stage = 0;
  for (int k0 = begin; k0 < end; k0 += kDepth, stage ^= 1) {
    if (k0 + kDepth < end) fetch(k0 + kDepth, stage ^ 1);
    cp_async_commit();
    cp_async_wait_all_but_one();
    __syncthreads();  // the copies of all threads for this step have arrived
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      if (k0 + k >= end) break;  // the rest of the step is zero
      uint32_t a[4];
      load_a<padded(kLeftCols), kLeftTransposed>(
          a, kLeftTransposed ? &tiles.left[stage][k][warp_row] : &tiles.left[stage][warp_row][k]);
#pragma unroll
      for (int n = 0; n < kMmaCols; n += 2) {
        const int col = warp_col + 8 * n;
        uint32_t b[4];
        load_b<padded(kRightCols), kRightTransposed>(
            b, kRightTransposed ? &tiles.right[stage][col][k] : &tiles.right[stage][k][col]);
        mma(sums[n], a, b[0], b[1], T{});
        mma(sums[n + 1], a, b[2], b[3], T{});
      }
    }
    __syncthreads();  // all threads have read the operands of this step; the step after next may overwrite them
  }

  const int64_t rows = out.matrix.rows, cols = out.matrix.cols;
#pragma unroll
  for (int n = 0; n < kMmaCols; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float first = alpha * sums[n][2 * half], second = alpha * sums[n][2 * half + 1];
      const int tile_row = warp_row + quad + 8 * half, tile_col = warp_col + 8 * n + 2 * lane_in_quad;
      if (kAccumulate) {
        auto* at = reinterpret_cast<Pair<T>*>(&tiles.out[tile_row][tile_col]);
        Pair<T> pair = *at;
        from_float(to_float(pair.first) + first, &pair.first);
        from_float(to_float(pair.second) + second, &pair.second);
        *at = pair;
        continue;
      }
      const int64_t row = row0 + tile_row, col = col0 + tile_col;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (row >= rows || col + j >= cols) continue;
        if (gridDim.z == 1) {
          store(out.matrix, row, col + j, j == 0 ? first : second);
        } else {
          partial[(blockIdx.z * rows + row) * cols + col + j] = sums[n][2 * half + j];
        }
      }
    }
  }
  if (kAccumulate) {
    __syncthreads();
    write_tile<kTileRows, kTileCols>(out, tiles.out[0], row0, col0);
  }
}

}  // namespace
}  // namespace fedspine
