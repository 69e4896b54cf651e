// What both forms of importance_accumulate share: how a matrix is cut, the check of the groups, and stage two.
//
// Stage one leaves partial[slice][i], the sum over the slice's columns of row i (or over its rows of column i).
// How many slices there are depends on the shape alone, and every sum has a fixed order: no float atomics, the same
// bits on every run and every GPU.
#pragma once

#include "common.cuh"

namespace fedspine {
namespace {

constexpr int kTile = 64;  // rows and columns of W per tile of stage one
constexpr int kUnsorted = 1, kOutside = 2;

// Blocks of stage one take this many tiles along the summed direction. About a thousand blocks fill a large GPU several
// times (three run at once on an SM), so that the last ones leave little of it idle; from two tiles on, one arrives
// while another is computed, and partial sums and reads of the kept side's factors are saved. A function of the shape,
// never of the GPU.
inline int64_t tiles_per_block(int64_t rows, int64_t cols) {
  const int64_t tiles = ceil_div(rows, kTile) * ceil_div(cols, kTile);
  if (tiles < 128) return 1;
  return tiles < 2048 ? 2 : tiles >= 16384 ? 16 : tiles / 1024;
}

inline int64_t num_slices(int64_t rows, int64_t cols, bool by_row) {
  return ceil_div(ceil_div(by_row ? cols : rows, kTile), tiles_per_block(rows, cols));
}

// Called by whole blocks, those with blockIdx.y == 0: flags[blockIdx.x] = what is unusual about the kTile group ids
// from first on: one is smaller than its left neighbour, one is outside [0, num_groups).
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

// The first index whose id is value or more, in ascending ids; called by whole warps, 32 probes at once.
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

// Stage two: one warp per group adds its partial sums in an order fixed by the shapes, in double (length * slices
// additions in all, so that their rate does not matter). Ascending group ids, the usual case, are found by a search;
// others by a scan of the whole vector. Indices fit 32 bits: length * slices does (importance_accumulate_cuda). An id
// outside makes every score NaN.
__global__ void __launch_bounds__(kGroupThreads)
    importance_sum_groups(const float* partial, int slices, const int32_t* group, int length, int64_t num_groups,
                          const int* flags, float* scores) {
  const int lane = threadIdx.x % 32;
  const int64_t g = static_cast<int64_t>(blockIdx.x) * (kGroupThreads / 32) + threadIdx.x / 32;
  if (g >= num_groups) return;  // whole warps leave together
  int unusual = 0;
  for (int i = lane; i < (length + kTile - 1) / kTile; i += 32) unusual |= flags[i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) unusual |= __shfl_xor_sync(0xffffffffu, unusual, offset);
  double total = 0.0;
  if (unusual & kUnsorted) {
    for (int i = lane; i < length; i += 32) {
      if (group[i] != g) continue;
      for (int s = 0; s < slices; ++s) total += partial[s * length + i];
    }
  } else {
    const int begin = lower_bound(group, length, g), count = lower_bound(group, length, g + 1) - begin;
    for (int e = lane; e < count * slices; e += 32) total += partial[e / count * length + begin + e % count];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
  if (lane == 0) scores[g] = unusual & kOutside ? __int_as_float(0x7fc00000) : static_cast<float>(total);
}

}  // namespace
}  // namespace fedspine
