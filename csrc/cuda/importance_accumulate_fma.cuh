// Stage one of importance_accumulate on the CUDA cores, for any strides and any mixture of fp32, fp16 and bf16.
//
// Memory traffic for W (m, n) with e bytes per element, rank r and factors with f bytes per element: W once (e m n
// bytes) and the factors once per tile, from L2 (5 f r m n / 64 bytes). Arithmetic: 6 r m n FLOPs in fp32. At r = 16 in
// fp32 that is 24 FLOPs per byte of W, more than Hopper (67 TFLOP/s at 4.8 TB/s) or Orin (5.3 TFLOP/s at 205 GB/s) can
// execute while W is read. The kernel is bound by arithmetic.
#pragma once

#include "importance_accumulate_groups.cuh"

namespace fedspine {
namespace {

constexpr int kImportanceFmaDepth = 16;     // ranks in shared memory at a time: 5 * 16 * 64 * 4 = 20 KiB per block
constexpr int kImportanceFmaThreads = 256;  // 16 x 16 threads, 4 x 4 elements each: 48 FMAs per five 16-byte loads

// partial[slice, i] = the sum of row i over the columns of the slice (kByRow), or of column i over its rows. Exactly
// one thread loads an element of W. It does so before the loop over ranks, whose arithmetic hides the latency.
template <typename T, bool kByRow>
__global__ void __launch_bounds__(kImportanceFmaThreads)
    importance_sums_fma(Matrix weight, Matrix lora_a, Matrix lora_b, Matrix grad_a, Matrix grad_b, float scaling,
                        Metric metric, const int32_t* group, int64_t num_groups, int64_t tiles_per_block, int* flags,
                        float* partial) {
  struct __align__(16) Factors {
    float row[3][kImportanceFmaDepth][kTile];  // gB, scaling B, B - gB
    float col[2][kImportanceFmaDepth][kTile];  // A, gA
  };
  FEDSPINE_SHARED(Factors, factors);
  const int thread_col = threadIdx.x % 16, thread_row = threadIdx.x / 16;
  const int64_t rank = lora_a.rows;
  const int64_t kept0 = static_cast<int64_t>(blockIdx.x) * kTile;  // the first row (or column) of this block
  const int64_t summed = kByRow ? weight.cols : weight.rows;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * tiles_per_block * kTile;
  if (blockIdx.y == 0) check_groups(group, kByRow ? weight.rows : weight.cols, kept0, num_groups, flags);
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};

  for (int64_t tile0 = first; tile0 < summed && tile0 < first + tiles_per_block * kTile; tile0 += kTile) {
    const int64_t row0 = kByRow ? kept0 : tile0, col0 = kByRow ? tile0 : kept0;
    float w[4][4], ghat[4][4], delta[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t row = row0 + 4 * thread_row + i, col = col0 + 4 * thread_col + j;
        w[i][j] = row < weight.rows && col < weight.cols ? to_float(*element<T>(weight, row, col)) : 0.0f;
        ghat[i][j] = 0.0f;
        delta[i][j] = 0.0f;
      }
    }
    for (int64_t k0 = 0; k0 < rank; k0 += kImportanceFmaDepth) {
      __syncthreads();  // all threads have read the factors of the previous step
      for (int e = threadIdx.x; e < kImportanceFmaDepth * kTile; e += kImportanceFmaThreads) {
        // Neighbouring threads read neighbouring columns of A and write to different banks of shared memory.
        const int k = e / kTile, i = e % kTile;
        const int64_t rk = k0 + k, row = row0 + i, col = col0 + i;
        const bool row_inside = rk < rank && row < weight.rows, col_inside = rk < rank && col < weight.cols;
        const float b = row_inside ? load(lora_b, row, rk) : 0.0f;
        const float gb = row_inside ? load(grad_b, row, rk) : 0.0f;
        factors.row[0][k][i] = gb;
        factors.row[1][k][i] = scaling * b;
        factors.row[2][k][i] = b - gb;
        factors.col[0][k][i] = col_inside ? load(lora_a, rk, col) : 0.0f;
        factors.col[1][k][i] = col_inside ? load(grad_a, rk, col) : 0.0f;
      }
      __syncthreads();
      const int depth = static_cast<int>(rank - k0 < kImportanceFmaDepth ? rank - k0 : kImportanceFmaDepth);
      // gb, sb, db: gB, scaling B and B - gB of four rows. a, ga: A and gA of four columns.
#pragma unroll 2
      for (int k = 0; k < depth; ++k) {
        const float4 gb4 = *reinterpret_cast<const float4*>(&factors.row[0][k][4 * thread_row]);
        const float4 sb4 = *reinterpret_cast<const float4*>(&factors.row[1][k][4 * thread_row]);
        const float4 db4 = *reinterpret_cast<const float4*>(&factors.row[2][k][4 * thread_row]);
        const float4 a4 = *reinterpret_cast<const float4*>(&factors.col[0][k][4 * thread_col]);
        const float4 ga4 = *reinterpret_cast<const float4*>(&factors.col[1][k][4 * thread_col]);
        const float gb[4] = {gb4.x, gb4.y, gb4.z, gb4.w}, sb[4] = {sb4.x, sb4.y, sb4.z, sb4.w};
        const float db[4] = {db4.x, db4.y, db4.z, db4.w};
        const float a[4] = {a4.x, a4.y, a4.z, a4.w}, ga[4] = {ga4.x, ga4.y, ga4.z, ga4.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            ghat[i][j] = fmaf(gb[i], a[j], ghat[i][j]);
            ghat[i][j] = fmaf(db[i], ga[j], ghat[i][j]);
            delta[i][j] = fmaf(sb[i], a[j], delta[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float x = ghat[i][j] * (w[i][j] + delta[i][j]);
        if (metric == Metric::abs) x = fabsf(x);
        if (metric == Metric::square) x *= x;
        // Padding is skipped instead of computed, because 0 * infinity in a factor would be NaN.
        const bool inside = row0 + 4 * thread_row + i < weight.rows && col0 + 4 * thread_col + j < weight.cols;
        if (inside) sums[kByRow ? i : j] += x;
      }
    }
  }

  const int64_t length = kByRow ? weight.rows : weight.cols;
  float* out = partial + static_cast<int64_t>(blockIdx.y) * length;
  if (kByRow) {
    // The 16 threads of one thread_row are half a warp. The shuffle tree has a fixed shape.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float total = sums[i];
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset, 16);
      const int64_t row = kept0 + 4 * thread_row + i;
      if (thread_col == 0 && row < length) out[row] = total;
    }
  } else {
    __syncthreads();  // all threads have read the factors, whose memory now holds the 16 x 64 sums
    float (*by_thread_row)[kTile] = factors.row[0];
#pragma unroll
    for (int j = 0; j < 4; ++j) by_thread_row[thread_row][4 * thread_col + j] = sums[j];
    __syncthreads();
    const int64_t col = kept0 + threadIdx.x;
    if (threadIdx.x < kTile && col < length) {
      float total = 0.0f;
      for (int i = 0; i < 16; ++i) total += by_thread_row[i][threadIdx.x];
      out[col] = total;
    }
  }
}
static_assert(kImportanceFmaDepth == 16 && kImportanceFmaThreads == 256,
              "the column sums reuse factors.row[0] as 16 x 64 floats");

}  // namespace
}  // namespace fedspine
