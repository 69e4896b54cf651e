// Shared by both versions of importance_accumulate: the partition of W, the validation of the groups, and stage two.
//
// Stage one computes partial[slice][i], the sum of row i over the columns of the slice, or of column i over its rows.
// The number of slices depends on the shape alone, every sum has a fixed order, and there are no float atomics. The
// result has the same bits on every run and every GPU.
#pragma once

#include "common.cuh"

namespace fedspine {
namespace {

constexpr int kTile = 64;                   // rows and columns of W per tile of stage one
constexpr int kUnsorted = 1, kOutside = 2;  // flags of check_groups

// Return the number of tiles along the summed dimension that one block of stage one computes. About a thousand blocks
// fill a large GPU several times (an SM runs three at once), so the last ones leave little of it idle. With two tiles
// or more, one is loaded while another is computed, and there are fewer partial sums and fewer reads of the kept
// dimension's factors. The number depends on the shape, never on the GPU.
inline int64_t tiles_per_block(int64_t rows, int64_t cols) {
  const int64_t tiles = ceil_div(rows, kTile) * ceil_div(cols, kTile);
  if (tiles < 128) return 1;
  return tiles < 2048 ? 2 : tiles >= 16384 ? 16 : tiles / 1024;
}

inline int64_t num_slices(int64_t rows, int64_t cols, bool by_row) {
  return ceil_div(ceil_div(by_row ? cols : rows, kTile), tiles_per_block(rows, cols));
}

// Set flags[blockIdx.x] for the kTile group ids from `first` on: kUnsorted if an id is smaller than its left neighbour,
// kOutside if an id is outside [0, num_groups). Called by all threads of the blocks with blockIdx.y == 0.
__device__ inline void check_groups(const int32_t* group, int64_t length, int64_t first, int64_t num_groups,
                                    int* flags) {
  int bits = 0;
  const int64_t i = first + threadIdx.x;
  if (threadIdx.x < kTile && i < length) {
    const int32_t id = group[i];
    if (id < 0 || id >= num_groups) bits |= kOutside;
    if (i > 0 && group[i - 1] > id) bits |= kUnsorted;
  }
  const int outside = __syncthreads_or(bits & kOutside), unsorted = __syncthreads_or(bits & kUnsorted);
  if (threadIdx.x == 0) flags[blockIdx.x] = (outside ? kOutside : 0) | (unsorted ? kUnsorted : 0);
}

// Return the first index whose id is at least `value`, for ascending ids. Called by whole warps, which probe 32 ids at
// once.
__device__ inline int lower_bound(const int32_t* group, int length, int64_t value) {
  const int lane = threadIdx.x % 32;
  int first = 0;
  while (length > 0) {
    const int step = (length + 31) / 32, probe = lane * step;
    const bool smaller = probe < length && group[first + probe] < value;
    const int count = __popc(__ballot_sync(0xffffffffu, smaller));  // probes 0 .. count - 1 are smaller
    if (count == 0) break;
    const int passed = (count - 1) * step + 1, left = length - passed;
    first += passed;
    length = left < step - 1 ? left : step - 1;
  }
  return first;
}

constexpr int kGroupThreads = 256;

// Stage two: one warp per group adds the partial sums of its rows (or columns), in double and in an order that the
// shapes determine. There are only length * slices additions in all, so their rate does not matter. Ascending group
// ids, the usual case, are found by a search, others by a scan of the whole vector. Indices fit 32 bits, because
// importance_accumulate_cuda has checked length * slices. An id outside [0, num_groups) makes every score NaN.
__global__ void __launch_bounds__(kGroupThreads)
    importance_sum_groups(const float* partial, int slices, const int32_t* group, int length, int64_t num_groups,
                          const int* flags, float* scores) {
  const int lane = threadIdx.x % 32;
  const int64_t id = static_cast<int64_t>(blockIdx.x) * (kGroupThreads / 32) + threadIdx.x / 32;
  if (id >= num_groups) return;  // whole warps return together
  int found = 0;
  for (int i = lane; i < (length + kTile - 1) / kTile; i += 32) found |= flags[i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) found |= __shfl_xor_sync(0xffffffffu, found, offset);
  double total = 0.0;
  if (found & kUnsorted) {
    for (int i = lane; i < length; i += 32) {
      if (group[i] != id) continue;
      for (int slice = 0; slice < slices; ++slice) total += partial[slice * length + i];
    }
  } else {
    const int begin = lower_bound(group, length, id), count = lower_bound(group, length, id + 1) - begin;
    for (int e = lane; e < count * slices; e += 32) total += partial[e / count * length + begin + e % count];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
  if (lane == 0) scores[id] = found & kOutside ? __int_as_float(0x7fc00000) : static_cast<float>(total);
}

}  // namespace
}  // namespace fedspine
