// The low-rank products on the CUDA cores: any strides, any mixture of fp32, fp16 and bf16, fp32 sums.
//
// One strided tile kernel serves all three, its tile fitted to where the small dimension (r) lies: 64 x 64 for expand,
// 64 x 16 for project (reads X once per 16 ranks), 16 x 64 for gradient (likewise).
#pragma once

#include "common.cuh"

namespace fedspine {
namespace {

constexpr int kFmaThreads = 256;
constexpr int kFmaDepth = 32;

// Tile kBM x kBN, 16 x 16 threads, each with (kBM / 16) x (kBN / 16) elements 16 apart, so that a half-warp reads and
// writes neighbouring columns. Rows of shared memory are padded by one against bank conflicts while filling.
// With kAccumulate, out += alpha P Q; else partial[slice] = P Q over the slice, or out = alpha P Q when there is one.
template <int kBM, int kBN, bool kAccumulate>
__global__ void __launch_bounds__(kFmaThreads)
    lowrank_fma(Matrix out, Matrix p, Matrix q, float alpha, int64_t slice_depth, float* partial) {
  constexpr int kTM = kBM / 16, kTN = kBN / 16;
  struct Tiles {
    float p[kFmaDepth][kBM + 1], q[kFmaDepth][kBN + 1];
  };
  FEDSPINE_SHARED(Tiles, tiles);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kBM, col0 = static_cast<int64_t>(blockIdx.y) * kBN;
  const int64_t begin = static_cast<int64_t>(blockIdx.z) * slice_depth;
  const int64_t end = begin + slice_depth < p.cols ? begin + slice_depth : p.cols;
  float sums[kTM][kTN];
#pragma unroll
  for (int i = 0; i < kTM; ++i) {
#pragma unroll
    for (int j = 0; j < kTN; ++j) sums[i][j] = 0.0f;
  }
  for (int64_t k0 = begin; k0 < end; k0 += kFmaDepth) {
    __syncthreads();  // the previous step's tiles are no longer read
    for (int e = threadIdx.x; e < kFmaDepth * kBM; e += kFmaThreads) {
      // Neighbouring threads read along whichever direction is contiguous in memory.
      const int k = p.col_stride == 1 ? e % kFmaDepth : e / kBM, i = p.col_stride == 1 ? e / kFmaDepth : e % kBM;
      tiles.p[k][i] = k0 + k < end && row0 + i < p.rows ? load(p, row0 + i, k0 + k) : 0.0f;
    }
    for (int e = threadIdx.x; e < kFmaDepth * kBN; e += kFmaThreads) {
      const int k = q.col_stride == 1 ? e / kBN : e % kFmaDepth, j = q.col_stride == 1 ? e % kBN : e / kFmaDepth;
      tiles.q[k][j] = k0 + k < end && col0 + j < q.cols ? load(q, k0 + k, col0 + j) : 0.0f;
    }
    __syncthreads();
    const int depth = static_cast<int>(end - k0 < kFmaDepth ? end - k0 : kFmaDepth);
    for (int k = 0; k < depth; ++k) {
#pragma unroll
      for (int i = 0; i < kTM; ++i) {
#pragma unroll
        for (int j = 0; j < kTN; ++j) {
          sums[i][j] = fmaf(tiles.p[k][ty + 16 * i], tiles.q[k][tx + 16 * j], sums[i][j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTM; ++i) {
#pragma unroll
    for (int j = 0; j < kTN; ++j) {
      const int64_t row = row0 + ty + 16 * i, col = col0 + tx + 16 * j;
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
