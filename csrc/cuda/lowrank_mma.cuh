// The low-rank products on tensor cores: operands of one 16-bit format, fp32 sums.
//
// A (kBM, kBN) tile of P Q per block of four warps, kBK of the inner dimension per step; the next step's operands are
// on their way (cp.async) while this one is computed. Bytes and FLOPs, elements of 2 bytes, small dimension r:
//   expand    out (m, n) read and written, L once per 64 columns, R once per 64 rows: 4 m n + m n r / 16; 2 r m n FLOPs
//   project   X (m, k) once per 64 ranks (16 where r <= 16), S once per 64 rows: 2 m k + m k r / 32; 2 r m k FLOPs
//   gradient  X (m, n) likewise, L once per 64 columns: 2 m n + m n r / 32; 2 r m n FLOPs
// At r = 16 that is 6.4 FLOPs per byte for expand and 13 for the others, a fifteenth of what tensor cores could do
// while memory delivers (H200 about 200 FLOPs per byte, Orin about 210): bound by memory for every rank up to 256.
#pragma once

#include "tiles.cuh"

namespace fedspine {
namespace {

constexpr int kMmaThreads = 128;

// An operand, stored as the kernel's layout names it: (outer, inner) or transposed. Where it is aligned it is read 16
// bytes at a time; the branch is the same for a whole launch.
struct Operand {
  Matrix matrix;
  AlignedRows rows;
  bool aligned;
};

template <int kRows, int kCols>
__device__ inline void copy_operand(uint16_t* tile, const Operand& from, int row0, int col0) {
  if (from.aligned) {
    copy_tile<kRows, kCols, kMmaThreads>(tile, from.rows, row0, col0);
  } else {
    copy_tile<kRows, kCols, kMmaThreads>(tile, from.matrix, row0, col0);
  }
}

// Writes a tile back, 16 bytes at a time where the matrix allows it.
template <int kRows, int kCols>
__device__ inline void write_tile(const Operand& to, const uint16_t* tile, int row0, int col0) {
  const Matrix& m = to.matrix;
  if (!to.aligned) {
    for (int e = threadIdx.x; e < kRows * kCols; e += kMmaThreads) {
      const int i = e / kCols, j = e % kCols;
      if (row0 + i < m.rows && col0 + j < m.cols) {
        *element<uint16_t>(m, row0 + i, col0 + j) = tile[i * padded(kCols) + j];
      }
    }
    return;
  }
#pragma unroll
  for (int e = threadIdx.x; e < kRows * kCols / 8; e += kMmaThreads) {
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

// out += alpha P Q with kAccumulate, which needs `out` in T; else partial[slice] = P Q over slice blockIdx.z of the
// inner dimension, or out = alpha P Q when there is one slice. P (rows, depth) is stored transposed with kPTransposed,
// Q (depth, cols) with kQTransposed.
template <typename T, int kBM, int kBN, int kBK, bool kPTransposed, bool kQTransposed, bool kAccumulate>
__global__ void __launch_bounds__(kMmaThreads)
    lowrank_mma(Operand out, Operand p, Operand q, int depth, float alpha, int slice_depth, float* partial) {
  constexpr int kWarpsM = kBM / 16, kWarpsN = 4 / kWarpsM, kTilesN = kBN / kWarpsN / 8;
  static_assert(kWarpsM * kWarpsN == 4 && kTilesN % 2 == 0, "four warps of 16 rows and an even number of tiles");
  constexpr int kPRows = kPTransposed ? kBK : kBM, kPCols = kPTransposed ? kBM : kBK;
  constexpr int kQRows = kQTransposed ? kBN : kBK, kQCols = kQTransposed ? kBK : kBN;
  struct __align__(16) Tiles {
    uint16_t p[2][kPRows][padded(kPCols)];
    uint16_t q[2][kQRows][padded(kQCols)];
    uint16_t out[kAccumulate ? kBM : 1][padded(kBN)];
  };
  FEDSPINE_SHARED(Tiles, tiles);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_row = warp % kWarpsM * 16, warp_col = warp / kWarpsM * (kBN / kWarpsN);
  const int row0 = blockIdx.x * kBM, col0 = blockIdx.y * kBN;
  const int begin = blockIdx.z * slice_depth, end = depth - begin < slice_depth ? depth : begin + slice_depth;

  const auto fetch = [&](int k0, int stage) {
    copy_operand<kPRows, kPCols>(tiles.p[stage][0], p, kPTransposed ? k0 : row0, kPTransposed ? row0 : k0);
    copy_operand<kQRows, kQCols>(tiles.q[stage][0], q, kQTransposed ? col0 : k0, kQTransposed ? k0 : col0);
  };
  float sums[kTilesN][4] = {};
  if (kAccumulate) copy_operand<kBM, kBN>(tiles.out[0], out, row0, col0);
  if (begin < end) fetch(begin, 0);
  cp_async_commit();
  int stage = 0;
  for (int k0 = begin; k0 < end; k0 += kBK, stage ^= 1) {
    if (k0 + kBK < end) fetch(k0 + kBK, stage ^ 1);
    cp_async_commit();
    cp_async_wait_all_but_one();
    __syncthreads();  // this step's operands are there, everybody's copies included
#pragma unroll
    for (int k = 0; k < kBK; k += 16) {
      if (k0 + k >= end) break;  // only zeros follow
      uint32_t a[4];
      load_a<padded(kPCols), kPTransposed>(a,
                                           kPTransposed ? &tiles.p[stage][k][warp_row] : &tiles.p[stage][warp_row][k]);
#pragma unroll
      for (int n = 0; n < kTilesN; n += 2) {
        const int col = warp_col + 8 * n;
        uint32_t b[4];
        load_b<padded(kQCols), kQTransposed>(b, kQTransposed ? &tiles.q[stage][col][k] : &tiles.q[stage][k][col]);
        mma(sums[n], a, b[0], b[1], T{});
        mma(sums[n + 1], a, b[2], b[3], T{});
      }
    }
    __syncthreads();  // nobody reads this step's operands any more: the step after next may overwrite them
  }

  const int64_t rows = out.matrix.rows, cols = out.matrix.cols;
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float first = alpha * sums[n][2 * half], second = alpha * sums[n][2 * half + 1];
      const int tile_row = warp_row + g + 8 * half, tile_col = warp_col + 8 * n + 2 * t;
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
    write_tile<kBM, kBN>(out, tiles.out[0], row0, col0);
  }
}

}  // namespace
}  // namespace fedspine
