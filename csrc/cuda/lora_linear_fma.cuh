// The low-rank products of lora_linear on the CUDA cores, for any strides and any mixture of fp32, fp16 and bf16. Sums
// are fp32.
//
// One kernel computes all three products. Its tile fits the position of the small dimension r: 64 x 64 for expand,
// 64 x 16 for project and 16 x 64 for gradient. Project and gradient read X once per 16 ranks.
#pragma once

#include "common.cuh"

namespace fedspine {
namespace {

constexpr int kLoraLinearFmaThreads = 256;
constexpr int kLoraLinearFmaDepth = 32;  // elements of the inner dimension per step

// Compute out += alpha left right with kAccumulate. Otherwise compute partial[slice] = left right over one slice of the
// inner dimension, or out = alpha left right if there is only one slice.
//
// A block of 16 x 16 threads computes a tile of kTileRows x kTileCols. A thread has every 16th row and column of it, so
// a half-warp reads and writes neighbouring columns. Rows of shared memory are padded by one against bank conflicts.
template <int kTileRows, int kTileCols, bool kAccumulate>
__global__ void __launch_bounds__(kLoraLinearFmaThreads)
    lora_linear_fma(Matrix out, Matrix left, Matrix right, float alpha, int64_t slice_depth, float* partial) {
  constexpr int kThreadRows = kTileRows / 16, kThreadCols = kTileCols / 16;
  struct Tiles {
    float left[kLoraLinearFmaDepth][kTileRows + 1], right[kLoraLinearFmaDepth][kTileCols + 1];
  };
  FEDSPINE_SHARED(Tiles, tiles);
  const int thread_col = threadIdx.x % 16, thread_row = threadIdx.x / 16;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kTileRows,
                col0 = static_cast<int64_t>(blockIdx.y) * kTileCols;
  const int64_t begin = static_cast<int64_t>(blockIdx.z) * slice_depth;
  const int64_t end = begin + slice_depth < left.cols ? begin + slice_depth : left.cols;
  float sums[kThreadRows][kThreadCols];
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) sums[i][j] = 0.0f;
  }
  for (int64_t k0 = begin; k0 < end; k0 += kLoraLinearFmaDepth) {
    __syncthreads();  // all threads have read the tiles of the previous step
    for (int e = threadIdx.x; e < kLoraLinearFmaDepth * kTileRows; e += kLoraLinearFmaThreads) {
      // Neighbouring threads read along the dimension that is contiguous in memory.
      const int k = left.col_stride == 1 ? e % kLoraLinearFmaDepth : e / kTileRows,
                i = left.col_stride == 1 ? e / kLoraLinearFmaDepth : e % kTileRows;
      tiles.left[k][i] = k0 + k < end && row0 + i < left.rows ? load(left, row0 + i, k0 + k) : 0.0f;
    }
    for (int e = threadIdx.x; e < kLoraLinearFmaDepth * kTileCols; e += kLoraLinearFmaThreads) {
      const int k = right.col_stride == 1 ? e / kTileCols : e % kLoraLinearFmaDepth,
                j = right.col_stride == 1 ? e % kTileCols : e / kLoraLinearFmaDepth;
      tiles.right[k][j] = k0 + k < end && col0 + j < right.cols ? load(right, k0 + k, col0 + j) : 0.0f;
    }
    __syncthreads();
    const int depth = static_cast<int>(end - k0 < kLoraLinearFmaDepth ? end - k0 : kLoraLinearFmaDepth);
    for (int k = 0; k < depth; ++k) {
#pragma unroll
      for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadCols; ++j) {
          sums[i][j] = fmaf(tiles.left[k][thread_row + 16 * i], tiles.right[k][thread_col + 16 * j], sums[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadCols; ++j) {
      const int64_t row = row0 + thread_row + 16 * i, col = col0 + thread_col + 16 * j;
      if (row >= out.rows || col >= out.cols) continue;
      if (kAccumulate) {
        store(out, row, col, load(out, row, col) + alpha * sums[i][j]);
      } else if (gridDim.z == 1) {
        store(out, row, col, alpha * sums[i][j]);
      } else {
        partial[(blockIdx.z * out.rows + row) * out.cols + col] = sums[i][j];
      }
    }
  }
}

}  // namespace
}  // namespace fedspine
