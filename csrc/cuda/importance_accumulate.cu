// Group scores of LoRA-guided importance on CUDA. Reference: importance_accumulate_reference in
// csrc/cpu/importance_accumulate.cpp and fedspine_edge/kernels/reference.py.
//
// Traffic, W (m, n) of e bytes, rank r, factors of f bytes: W once (e m n), the factors once per tile from L2
// (5 f r m n / 64), partial sums 2 * 4 m n / 128. Work: 6 r m n FLOPs on the CUDA cores. At r = 16 and bf16 that is
// 48 FLOPs per byte of W: compute-bound on Hopper (67 TFLOP/s fp32, 4.8 TB/s) and on Orin (5.3 TFLOP/s, 205 GB/s).
// The eager form moves about 21 matrices of m x n and allocates three.
#include "common.cuh"

namespace fedspine {
namespace {

constexpr const char* kOp = "importance_accumulate";
constexpr int kTile = 64;          // rows and columns of W per tile
constexpr int kDepth = 16;         // ranks in shared memory at a time: 5 * 16 * 64 * 4 = 20 KiB per block
constexpr int kThreads = 256;      // 16 x 16 threads of 4 x 4 elements: 48 FMAs per five 16-byte shared loads
constexpr int kTilesPerBlock = 2;  // along the summed direction; small matrices need the blocks more than the reuse
constexpr int kUnsorted = 1, kOutside = 2;

// Sets bits in *flags: group ids that decrease, ids outside [0, num_groups). Integer OR: order does not matter.
__global__ void importance_check_groups(const int32_t* group, int64_t length, int64_t num_groups, int* flags) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= length) return;
  int bits = 0;
  if (group[i] < 0 || group[i] >= num_groups) bits |= kOutside;
  if (i > 0 && group[i - 1] > group[i]) bits |= kUnsorted;
  if (bits != 0) atomicOr(flags, bits);
}

// Stage one: partial[slice, i] = sum over the slice's columns of row i (kByRow), or over its rows of column i.
// Every element of W is loaded by exactly one thread, before the loop over ranks whose arithmetic hides the latency.
template <typename T, bool kByRow>
__global__ void __launch_bounds__(kThreads)
    importance_partial_sums(Matrix weight, Matrix lora_a, Matrix lora_b, Matrix grad_a, Matrix grad_b, float scaling,
                            Metric metric, float* partial) {
  __shared__ __align__(16) float row_factors[3][kDepth][kTile];  // gB, scaling B, B - gB
  __shared__ __align__(16) float col_factors[2][kDepth][kTile];  // A, gA
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t rank = lora_a.rows;
  const int64_t kept0 = static_cast<int64_t>(blockIdx.x) * kTile;  // where this block's rows (or columns) begin
  const int64_t summed = kByRow ? weight.cols : weight.rows;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTilesPerBlock * kTile;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};

  for (int64_t tile0 = first; tile0 < summed && tile0 < first + kTilesPerBlock * kTile; tile0 += kTile) {
    const int64_t row0 = kByRow ? kept0 : tile0, col0 = kByRow ? tile0 : kept0;
    float w[4][4], ghat[4][4], delta[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t row = row0 + 4 * ty + i, col = col0 + 4 * tx + j;
        w[i][j] = row < weight.rows && col < weight.cols ? to_float(*element<T>(weight, row, col)) : 0.0f;
        ghat[i][j] = 0.0f;
        delta[i][j] = 0.0f;
      }
    }
    for (int64_t k0 = 0; k0 < rank; k0 += kDepth) {
      __syncthreads();  // the previous step's factors are no longer read
      for (int e = threadIdx.x; e < kDepth * kTile; e += kThreads) {
        const int k = e / kTile,
                  i = e % kTile;  // neighbouring threads: neighbouring columns of A, banks of shared memory
        const int64_t rk = k0 + k, row = row0 + i, col = col0 + i;
        const bool row_inside = rk < rank && row < weight.rows, col_inside = rk < rank && col < weight.cols;
        const float b = row_inside ? load(lora_b, row, rk) : 0.0f;
        const float gb = row_inside ? load(grad_b, row, rk) : 0.0f;
        row_factors[0][k][i] = gb;
        row_factors[1][k][i] = scaling * b;
        row_factors[2][k][i] = b - gb;
        col_factors[0][k][i] = col_inside ? load(lora_a, rk, col) : 0.0f;
        col_factors[1][k][i] = col_inside ? load(grad_a, rk, col) : 0.0f;
      }
      __syncthreads();
      const int depth = static_cast<int>(rank - k0 < kDepth ? rank - k0 : kDepth);
#pragma unroll 2
      for (int k = 0; k < depth; ++k) {
        const float4 gb4 = *reinterpret_cast<const float4*>(&row_factors[0][k][4 * ty]);
        const float4 sb4 = *reinterpret_cast<const float4*>(&row_factors[1][k][4 * ty]);
        const float4 db4 = *reinterpret_cast<const float4*>(&row_factors[2][k][4 * ty]);
        const float4 a4 = *reinterpret_cast<const float4*>(&col_factors[0][k][4 * tx]);
        const float4 ga4 = *reinterpret_cast<const float4*>(&col_factors[1][k][4 * tx]);
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
        // Padding is skipped, not computed: 0 * infinity in a factor would be NaN.
        const bool inside = row0 + 4 * ty + i < weight.rows && col0 + 4 * tx + j < weight.cols;
        if (inside) sums[kByRow ? i : j] += x;
      }
    }
  }

  const int64_t length = kByRow ? weight.rows : weight.cols;
  float* out = partial + static_cast<int64_t>(blockIdx.y) * length;
  if (kByRow) {
    // The 16 threads of one ty are half a warp: a shuffle tree of fixed shape.
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float total = sums[i];
#pragma unroll
      for (int offset = 8; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset, 16);
      const int64_t row = kept0 + 4 * ty + i;
      if (tx == 0 && row < length) out[row] = total;
    }
  } else {
    __syncthreads();  // the factors are no longer read: their memory takes the 16 x 64 sums
    float (*by_thread_row)[kTile] = row_factors[0];
#pragma unroll
    for (int j = 0; j < 4; ++j) by_thread_row[ty][4 * tx + j] = sums[j];
    __syncthreads();
    const int64_t col = kept0 + threadIdx.x;
    if (threadIdx.x < kTile && col < length) {
      float total = 0.0f;
      for (int i = 0; i < 16; ++i) total += by_thread_row[i][threadIdx.x];
      out[col] = total;
    }
  }
}
static_assert(kDepth == 16 && kThreads == 256, "the column sums reuse row_factors[0] as 16 x 64 floats");

__device__ inline int64_t lower_bound(const int32_t* group, int64_t length, int64_t value) {
  int64_t first = 0;
  while (first < length) {
    const int64_t middle = (first + length) / 2;
    if (group[middle] < value) {
      first = middle + 1;
    } else {
      length = middle;
    }
  }
  return first;
}

// Stage two: one warp per group adds its partial sums in an order fixed by the shapes, in double (m n / 128 additions
// in all, so that their rate does not matter). Ascending group ids, the usual case, are found by bisection; others by
// a scan of the whole vector.
__global__ void __launch_bounds__(kThreads)
    importance_sum_groups(const float* partial, int64_t slices, const int32_t* group, int64_t length,
                          int64_t num_groups, const int* flags, float* scores) {
  const int lane = threadIdx.x % 32;
  const int64_t g = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (g >= num_groups) return;  // whole warps leave together
  double total = 0.0;
  if (*flags & kUnsorted) {
    for (int64_t i = lane; i < length; i += 32) {
      if (group[i] != g) continue;
      for (int64_t s = 0; s < slices; ++s) total += partial[s * length + i];
    }
  } else {
    const int64_t begin = lower_bound(group, length, g), count = lower_bound(group, length, g + 1) - begin;
    for (int64_t e = lane; e < count * slices; e += 32) total += partial[(e / count) * length + begin + e % count];
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_down_sync(0xffffffffu, total, offset);
  if (lane == 0) scores[g] = *flags & kOutside ? __int_as_float(0x7fc00000) : static_cast<float>(total);
}

int64_t num_slices(int64_t rows, int64_t cols, bool by_row) {
  return ceil_div(by_row ? cols : rows, kTile * kTilesPerBlock);
}

template <typename T>
void launch_partial_sums(const ImportanceArgs& args, float* partial, cudaStream_t stream) {
  const int64_t length = args.by_row ? args.weight.rows : args.weight.cols;
  const dim3 grid(grid_size(kOp, ceil_div(length, kTile), kGridX),
                  grid_size(kOp, num_slices(args.weight.rows, args.weight.cols, args.by_row), kGridY));
  const auto kernel = args.by_row ? importance_partial_sums<T, true> : importance_partial_sums<T, false>;
  kernel<<<grid, kThreads, 0, stream>>>(args.weight, args.lora_a, args.lora_b, args.grad_a, args.grad_b, args.scaling,
                                        args.metric, partial);
  check_launch(kOp);
}

}  // namespace

// Four floats (16 bytes) of flags, then the partial sums.
int64_t importance_workspace_floats(int64_t rows, int64_t cols, bool by_row) {
  return 4 + num_slices(rows, cols, by_row) * (by_row ? rows : cols);
}

void importance_accumulate_cuda(const ImportanceArgs& args, float* workspace, int device, uintptr_t stream_address) {
  const DeviceScope scope(kOp, device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const int64_t rows = args.weight.rows, cols = args.weight.cols;
  if (rows == 0 || cols == 0) {
    check(kOp, "cudaMemsetAsync", cudaMemsetAsync(args.scores, 0, args.num_groups * sizeof(float), stream));
    return;
  }
  const int64_t length = args.by_row ? rows : cols;
  int* flags = reinterpret_cast<int*>(workspace);
  float* partial = workspace + 4;
  check(kOp, "cudaMemsetAsync", cudaMemsetAsync(flags, 0, sizeof(int), stream));
  importance_check_groups<<<grid_size(kOp, ceil_div(length, kThreads), kGridX), kThreads, 0, stream>>>(
      args.group, length, args.num_groups, flags);
  check_launch(kOp);
  if (args.weight.dtype == DType::f32) {
    launch_partial_sums<float>(args, partial, stream);
  } else if (args.weight.dtype == DType::f16) {
    launch_partial_sums<__half>(args, partial, stream);
  } else {
    launch_partial_sums<__nv_bfloat16>(args, partial, stream);
  }
  importance_sum_groups<<<grid_size(kOp, ceil_div(args.num_groups, kThreads / 32), kGridX), kThreads, 0, stream>>>(
      partial, num_slices(rows, cols, args.by_row), args.group, length, args.num_groups, flags, args.scores);
  check_launch(kOp);
}

int cuda_runtime_version() {
  int version = 0;
  check("build_info", "cudaRuntimeGetVersion", cudaRuntimeGetVersion(&version));
  return version;
}

}  // namespace fedspine
