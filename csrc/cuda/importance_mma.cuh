// Stage one of importance_accumulate on tensor cores: W and all four factors of one 16-bit format, fp32 sums.
//
// Ghat = gB A + B gA - gB gA takes three rank-r products of the factors as they are (B - gB would have to be rounded),
// B A a fourth. Traffic, W (m, n), rank r: W once (2 m n bytes), the summed side's factors once per tile (4 r m n / 64,
// from L2), the kept side's once per block up to rank 32, else once per tile; partial sums 4 m n / (64 tiles per
// block). Work: 8 r m n FLOPs. At r = 16 that is 64 FLOPs per byte of W, a tenth of what H200 (about 990 dense TFLOP/s,
// 4.8 TB/s) and a third of what Orin (about 43 and 205 GB/s) can do while W arrives: bound by memory up to r = 48 or
// so.
#pragma once

#include "importance_groups.cuh"
#include "tiles.cuh"

namespace fedspine {
namespace {

constexpr int kMmaThreads = 256;  // 4 x 2 warps of 16 rows and 32 columns
constexpr int kMmaDepth = 16;     // ranks per step, the depth of one mma

// 39 KiB: four blocks fit into the shared memory of an SM of Orin (164 KiB), three into its registers.
struct __align__(16) ImportanceTiles {
  union {
    uint16_t weight[2][kTile][padded(kTile)];
    float sums[4][kTile];  // at the end, when W is no longer read: [warp row or warp column][kept index]
  };
  uint16_t row_factors[2][2][kTile][padded(kMmaDepth)];  // [stage][gB, B]
  uint16_t col_factors[2][2][kMmaDepth][padded(kTile)];  // [stage][A, gA]
};

// Copies a factor of any strides to contiguous rows of `out`, whose padding stays as it is.
__global__ void __launch_bounds__(kMmaThreads) importance_pack(Matrix in, uint16_t* out, int stride) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kMmaThreads + threadIdx.x, row = e / in.cols, col = e % in.cols;
  if (row < in.rows) out[row * stride + col] = *element<uint16_t>(in, row, col);
}

// Field by field: a reference to a parameter that is chosen at run time would put both on the stack.
__device__ inline AlignedRows pick(bool first, const AlignedRows& a, const AlignedRows& b) {
  return {first ? a.data : b.data, a.rows, a.cols, first ? a.stride : b.stride};
}

// A step is 16 ranks of one tile. While it is computed the next step's factors, and with a tile's first step its part
// of W, are on their way. Source is AlignedRows, or Matrix for a W of other strides.
template <typename T, typename Source, bool kByRow>
__global__ void __launch_bounds__(kMmaThreads, 3)
    importance_sums_mma(Source weight, AlignedRows lora_a, AlignedRows lora_b, AlignedRows grad_a, AlignedRows grad_b,
                        float scaling, Metric metric, const int32_t* group, int64_t num_groups, int tiles_per_block,
                        int* flags, float* partial) {
  FEDSPINE_SHARED(ImportanceTiles, tiles);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = threadIdx.x / 32 % 4 * 16, warp_col = threadIdx.x / 128 * 32;
  const int rows = lora_b.rows, cols = lora_a.cols, rank = lora_a.rows;
  const int kept0 = blockIdx.x * kTile;                      // where this block's rows (or columns) begin
  const int moving0 = blockIdx.y * tiles_per_block * kTile;  // where its first tile begins in the summed direction
  const int left = ((kByRow ? cols : rows) - moving0 + kTile - 1) / kTile;
  const int chunks = (rank + kMmaDepth - 1) / kMmaDepth;
  const int num_tiles = left < tiles_per_block ? left : tiles_per_block;
  if (blockIdx.y == 0) check_groups(group, kByRow ? rows : cols, kept0, num_groups, flags);

  const auto fetch = [&](int tile, int chunk, int stage) {
    const int row0 = kByRow ? kept0 : moving0 + tile * kTile, col0 = kByRow ? moving0 + tile * kTile : kept0;
    if (chunk == 0) copy_tile<kTile, kTile, kMmaThreads>(tiles.weight[tile % 2][0], weight, row0, col0);
    // Up to two chunks, the kept side's factors stay in the two stages. Half of the threads copy A and B, half gA, gB.
    const bool first_half = threadIdx.x < kMmaThreads / 2;
    const int thread = threadIdx.x % (kMmaThreads / 2), rank0 = chunk * kMmaDepth;
    const bool kept = chunks > 2 || tile == 0;
    const int kept_stage = chunks > 2 ? stage : chunk;
    if (!kByRow || kept) {
      copy_tile<kTile, kMmaDepth, kMmaThreads / 2>(
          tiles.row_factors[kByRow ? kept_stage : stage][first_half ? 1 : 0][0], pick(first_half, lora_b, grad_b), row0,
          rank0, thread);
    }
    if (kByRow || kept) {
      copy_tile<kMmaDepth, kTile, kMmaThreads / 2>(
          tiles.col_factors[kByRow ? stage : kept_stage][first_half ? 0 : 1][0], pick(first_half, lora_a, grad_a),
          rank0, col0, thread);
    }
  };

  float ghat[4][4], delta[4][4];    // this warp's four tiles of 16 rows and 8 columns
  float sums[kByRow ? 2 : 8] = {};  // of rows g and g + 8, or of columns 8 n + 2 t and 8 n + 2 t + 1
  fetch(0, 0, 0);
  cp_async_commit();
  int tile = 0, chunk = 0;
  for (int stage = 0; tile < num_tiles; stage ^= 1) {
    const bool last_chunk = chunk + 1 == chunks;
    const int next_tile = last_chunk ? tile + 1 : tile, next_chunk = last_chunk ? 0 : chunk + 1;
    if (next_tile < num_tiles) fetch(next_tile, next_chunk, stage ^ 1);
    cp_async_commit();
    cp_async_wait_all_but_one();
    __syncthreads();  // this step's tiles are there, everybody's copies included
    if (chunk == 0) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ghat[n][i] = delta[n][i] = 0.0f;
      }
    }
    const int kept_stage = chunks > 2 ? stage : chunk;
    const auto& row_part = tiles.row_factors[kByRow ? kept_stage : stage];
    const auto& col_part = tiles.col_factors[kByRow ? stage : kept_stage];
    uint32_t grad_b_part[4], lora_b_part[4];
    load_a<padded(kMmaDepth), false>(grad_b_part, &row_part[0][warp_row][0]);
    load_a<padded(kMmaDepth), false>(lora_b_part, &row_part[1][warp_row][0]);
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t a[4], grad_a_part[4];
      load_b<padded(kTile), false>(a, &col_part[0][0][warp_col + 8 * n]);
      load_b<padded(kTile), false>(grad_a_part, &col_part[1][0][warp_col + 8 * n]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t ga0 = grad_a_part[2 * h], ga1 = grad_a_part[2 * h + 1];
        mma(ghat[n + h], grad_b_part, a[2 * h], a[2 * h + 1], T{});
        mma(ghat[n + h], lora_b_part, ga0, ga1, T{});
        mma(ghat[n + h], grad_b_part, ga0 ^ 0x80008000u, ga1 ^ 0x80008000u, T{});  // both signs flipped
        mma(delta[n + h], lora_b_part, a[2 * h], a[2 * h + 1], T{});
      }
    }
    if (last_chunk) {
      const int row0 = (kByRow ? kept0 : moving0 + tile * kTile) + warp_row + g;
      const int col0 = (kByRow ? moving0 + tile * kTile : kept0) + warp_col + 2 * t;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint16_t* at = &tiles.weight[tile % 2][warp_row + g + 8 * half][warp_col + 2 * t + 8 * n];
          const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(at);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int i = 2 * half + j;
            float x = ghat[n][i] * fmaf(scaling, delta[n][i], to_float(j == 0 ? pair.first : pair.second));
            if (metric == Metric::abs) x = fabsf(x);
            if (metric == Metric::square) x *= x;
            // Padding is skipped, not computed: 0 * infinity in a factor would be NaN.
            if (row0 + 8 * half < rows && col0 + 8 * n + j < cols) sums[kByRow ? half : 2 * n + j] += x;
          }
        }
      }
    }
    __syncthreads();  // nobody reads this step's tiles any more: the step after next may overwrite them
    tile = next_tile;
    chunk = next_chunk;
  }

  // Sums of a warp by a shuffle tree, of the warps that share a row or column in the order of their numbers.
#pragma unroll
  for (int i = 0; i < (kByRow ? 2 : 8); ++i) {
    float total = sums[i];
    for (int offset = kByRow ? 1 : 4; offset < (kByRow ? 4 : 32); offset *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    if (kByRow && t == 0) tiles.sums[warp_col / 32][warp_row + g + 8 * i] = total;
    if (!kByRow && g == 0) tiles.sums[warp_row / 16][warp_col + 8 * (i / 2) + 2 * t + i % 2] = total;
  }
  __syncthreads();
  const int64_t length = kByRow ? rows : cols, kept = static_cast<int64_t>(kept0) + threadIdx.x;
  if (threadIdx.x < kTile && kept < length) {
    float total = 0.0f;
#pragma unroll
    for (int part = 0; part < (kByRow ? 2 : 4); ++part) total += tiles.sums[part][threadIdx.x];
    partial[static_cast<int64_t>(blockIdx.y) * length + kept] = total;
  }
}

}  // namespace
}  // namespace fedspine
