// Stage one of importance_accumulate on tensor cores, for W and factors of one 16-bit format. Sums are fp32.
//
// Ghat = gB A + B gA - gB gA takes three rank-r products of the factors as they are, because B - gB would have to be
// rounded. B A is a fourth product. Memory traffic for W (m, n) and rank r: W once (2 m n bytes); the factors of the
// summed dimension once per tile, from L2 (4 r m n / 64 bytes); those of the kept dimension once per block up to rank
// 32, else once per tile; partial sums of 4 m n / (64 tiles per block) bytes. Arithmetic: 8 r m n FLOPs. At r = 16 that
// is 64 FLOPs per byte of W, a tenth of what an H200 (about 990 dense TFLOP/s at 4.8 TB/s) and a third of what Orin
// (about 43 TFLOP/s at 205 GB/s) can execute while W is read. The kernel is bound by memory bandwidth up to about r
// = 48.
#pragma once

#include "importance_accumulate_groups.cuh"
#include "smem_tiles.cuh"

namespace fedspine {
namespace {

constexpr int kImportanceMmaThreads = 256;  // 4 x 2 warps of 16 rows and 32 columns
constexpr int kImportanceMmaDepth = 16;     // ranks per step, the depth of one mma

// 39 KiB. The shared memory of an SM of Orin (164 KiB) holds four blocks, its registers hold three.
struct __align__(16) ImportanceTiles {
  union {
    uint16_t weight[2][kTile][padded(kTile)];
    float sums[4][kTile];  // after the last read of W: [warp row or warp column][kept index]
  };
  uint16_t row_factors[2][2][kTile][padded(kImportanceMmaDepth)];  // [stage][gB, B]
  uint16_t col_factors[2][2][kImportanceMmaDepth][padded(kTile)];  // [stage][A, gA]
};

// Copy a factor with any strides to contiguous rows of `out`. The padding of `out` is not written.
__global__ void __launch_bounds__(kImportanceMmaThreads) importance_pack(Matrix in, uint16_t* out, int stride) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kImportanceMmaThreads + threadIdx.x;
  const int64_t row = e / in.cols, col = e % in.cols;
  if (row < in.rows) out[row * stride + col] = *element<uint16_t>(in, row, col);
}

// Return a or b. It selects field by field, because a reference selected at run time would put both parameters on the
// stack.
__device__ inline AlignedRows pick(bool first, const AlignedRows& a, const AlignedRows& b) {
  return {first ? a.data : b.data, a.rows, a.cols, first ? a.stride : b.stride};
}

// A step is 16 ranks of one tile. While a step is computed, the factors of the next one are copied and, with the first
// step of a tile, its part of W. Source is AlignedRows, or Matrix if W has other strides.
template <typename T, typename Source, bool kByRow>
__global__ void __launch_bounds__(kImportanceMmaThreads, 3)
    importance_sums_mma(Source weight, AlignedRows lora_a, AlignedRows lora_b, AlignedRows grad_a, AlignedRows grad_b,
                        float scaling, Metric metric, const int32_t* group, int64_t num_groups, int tiles_per_block,
                        int* flags, float* partial) {
  FEDSPINE_SHARED(ImportanceTiles, tiles);
  const int lane = threadIdx.x % 32, quad = lane / 4, lane_in_quad = lane % 4;
  const int warp_row = threadIdx.x / 32 % 4 * 16, warp_col = threadIdx.x / 128 * 32;
  const int rows = lora_b.rows, cols = lora_a.cols, rank = lora_a.rows;
  const int kept0 = blockIdx.x * kTile;                      // the first row (or column) of this block
  const int summed0 = blockIdx.y * tiles_per_block * kTile;  // the start of its first tile in the summed dimension
  const int left = ((kByRow ? cols : rows) - summed0 + kTile - 1) / kTile;
  const int chunks = (rank + kImportanceMmaDepth - 1) / kImportanceMmaDepth;
  const int num_tiles = left < tiles_per_block ? left : tiles_per_block;
  if (blockIdx.y == 0) check_groups(group, kByRow ? rows : cols, kept0, num_groups, flags);

  const auto fetch = [&](int tile, int chunk, int stage) {
    const int row0 = kByRow ? kept0 : summed0 + tile * kTile, col0 = kByRow ? summed0 + tile * kTile : kept0;
    if (chunk == 0) copy_tile<kTile, kTile, kImportanceMmaThreads>(tiles.weight[tile % 2][0], weight, row0, col0);
    // The factors of the kept dimension stay in the two stages if there are at most two chunks of ranks. Half of the
    // threads copy A and B, the other half gA and gB.
    const bool first_half = threadIdx.x < kImportanceMmaThreads / 2;
    const int thread = threadIdx.x % (kImportanceMmaThreads / 2), rank0 = chunk * kImportanceMmaDepth;
    const bool kept = chunks > 2 || tile == 0;
    const int kept_stage = chunks > 2 ? stage : chunk;
    if (!kByRow || kept) {
      copy_tile<kTile, kImportanceMmaDepth, kImportanceMmaThreads / 2>(
          tiles.row_factors[kByRow ? kept_stage : stage][first_half ? 1 : 0][0], pick(first_half, lora_b, grad_b), row0,
          rank0, thread);
    }
    if (kByRow || kept) {
      copy_tile<kImportanceMmaDepth, kTile, kImportanceMmaThreads / 2>(
          tiles.col_factors[kByRow ? stage : kept_stage][first_half ? 0 : 1][0], pick(first_half, lora_a, grad_a),
          rank0, col0, thread);
    }
  };

  float ghat[4][4], delta[4][4];    // of this warp's four tiles of 16 rows and 8 columns
  float sums[kByRow ? 2 : 8] = {};  // of rows quad and quad + 8, or of columns 8 n + 2 lane_in_quad + {0, 1}
  fetch(0, 0, 0);
  cp_async_commit();
  int tile = 0, chunk = 0;
  for (int stage = 0; tile < num_tiles; stage ^= 1) {
    const bool last_chunk = chunk + 1 == chunks;
    const int next_tile = last_chunk ? tile + 1 : tile, next_chunk = last_chunk ? 0 : chunk + 1;
    if (next_tile < num_tiles) fetch(next_tile, next_chunk, stage ^ 1);
    cp_async_commit();
    cp_async_wait_all_but_one();
    __syncthreads();  // the copies of all threads for this step have arrived
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
    load_a<padded(kImportanceMmaDepth), false>(grad_b_part, &row_part[0][warp_row][0]);
    load_a<padded(kImportanceMmaDepth), false>(lora_b_part, &row_part[1][warp_row][0]);
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      uint32_t a[4], grad_a_part[4];
      load_b<padded(kTile), false>(a, &col_part[0][0][warp_col + 8 * n]);
      load_b<padded(kTile), false>(grad_a_part, &col_part[1][0][warp_col + 8 * n]);
#pragma unroll
      for (int tile_n = 0; tile_n < 2; ++tile_n) {
        const uint32_t ga0 = grad_a_part[2 * tile_n], ga1 = grad_a_part[2 * tile_n + 1];
        mma(ghat[n + tile_n], grad_b_part, a[2 * tile_n], a[2 * tile_n + 1], T{});
        mma(ghat[n + tile_n], lora_b_part, ga0, ga1, T{});
        mma(ghat[n + tile_n], grad_b_part, ga0 ^ 0x80008000u, ga1 ^ 0x80008000u, T{});  // both signs flipped
        mma(delta[n + tile_n], lora_b_part, a[2 * tile_n], a[2 * tile_n + 1], T{});
      }
    }
    if (last_chunk) {
      const int row0 = (kByRow ? kept0 : summed0 + tile * kTile) + warp_row + quad;
      const int col0 = (kByRow ? summed0 + tile * kTile : kept0) + warp_col + 2 * lane_in_quad;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint16_t* at = &tiles.weight[tile % 2][warp_row + quad + 8 * half][warp_col + 2 * lane_in_quad + 8 * n];
          const Pair<T> pair = *reinterpret_cast<const Pair<T>*>(at);
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int i = 2 * half + j;
            float x = ghat[n][i] * fmaf(scaling, delta[n][i], to_float(j == 0 ? pair.first : pair.second));
            if (metric == Metric::abs) x = fabsf(x);
            if (metric == Metric::square) x *= x;
            // Padding is skipped instead of computed, because 0 * infinity in a factor would be NaN.
            if (row0 + 8 * half < rows && col0 + 8 * n + j < cols) sums[kByRow ? half : 2 * n + j] += x;
          }
        }
      }
    }
    __syncthreads();  // all threads have read the tiles of this step; the step after next may overwrite them
    tile = next_tile;
    chunk = next_chunk;
  }

  // Add the sums of a warp by a shuffle tree, then those of the warps that share a row or column in warp order.
#pragma unroll
  for (int i = 0; i < (kByRow ? 2 : 8); ++i) {
    float total = sums[i];
    for (int offset = kByRow ? 1 : 4; offset < (kByRow ? 4 : 32); offset *= 2) {
      total += __shfl_xor_sync(0xffffffffu, total, offset);
    }
    if (kByRow && lane_in_quad == 0) tiles.sums[warp_col / 32][warp_row + quad + 8 * i] = total;
    if (!kByRow && quad == 0) tiles.sums[warp_row / 16][warp_col + 8 * (i / 2) + 2 * lane_in_quad + i % 2] = total;
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
