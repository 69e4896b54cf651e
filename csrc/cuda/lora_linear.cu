// The low-rank products of lora_linear on CUDA. Reference: out = alpha P Q (+ out), each element a sum in fp32.
//
// One strided tile kernel serves all three, with the tile's shape fitted to where the small dimension (r) lies:
//   expand    (m, r) (r, n)   64 x 64 tiles; bytes: out read and written once, 2 e m n; FLOPs 2 r m n
//   project   (m, k) (k, r)   64 x 16 tiles, k in slices; bytes: x once per 16 ranks, e m k ceil(r / 16)
//   gradient  (r, m) (m, n)   16 x 64 tiles, tokens in slices; bytes: x once per 16 ranks
// Products with a long inner dimension are cut into slices whose number depends on the shapes alone, summed in a
// second stage in slice order: no float atomics, the same bits on every run and every GPU of a kind.
#include "common.cuh"

namespace fedspine {
namespace {

constexpr const char* kOp = "lora_linear";
constexpr int kThreads = 256;
constexpr int kDepth = 32;
constexpr int64_t kSlice = 512;  // inner elements per slice: 16 steps of kDepth amortise the partial's write

// Tile kBM x kBN, 16 x 16 threads, each with (kBM / 16) x (kBN / 16) elements 16 apart, so that a half-warp reads and
// writes neighbouring columns. Rows of shared memory are padded by one against bank conflicts while filling.
// With kAccumulate, out += alpha P Q; else partial[slice] = P Q over the slice, or out = alpha P Q when there is one.
template <int kBM, int kBN, bool kAccumulate>
__global__ void __launch_bounds__(kThreads)
    lowrank_product(Matrix out, Matrix p, Matrix q, float alpha, int64_t slice_depth, float* partial) {
  constexpr int kTM = kBM / 16, kTN = kBN / 16;
  __shared__ float p_tile[kDepth][kBM + 1];
  __shared__ float q_tile[kDepth][kBN + 1];
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
  for (int64_t k0 = begin; k0 < end; k0 += kDepth) {
    __syncthreads();  // the previous step's tiles are no longer read
    for (int e = threadIdx.x; e < kDepth * kBM; e += kThreads) {
      // Neighbouring threads read along whichever direction is contiguous in memory.
      const int k = p.col_stride == 1 ? e % kDepth : e / kBM, i = p.col_stride == 1 ? e / kDepth : e % kBM;
      p_tile[k][i] = k0 + k < end && row0 + i < p.rows ? load(p, row0 + i, k0 + k) : 0.0f;
    }
    for (int e = threadIdx.x; e < kDepth * kBN; e += kThreads) {
      const int k = q.col_stride == 1 ? e / kBN : e % kDepth, j = q.col_stride == 1 ? e % kBN : e / kDepth;
      q_tile[k][j] = k0 + k < end && col0 + j < q.cols ? load(q, k0 + k, col0 + j) : 0.0f;
    }
    __syncthreads();
    const int depth = static_cast<int>(end - k0 < kDepth ? end - k0 : kDepth);
    for (int k = 0; k < depth; ++k) {
#pragma unroll
      for (int i = 0; i < kTM; ++i) {
#pragma unroll
        for (int j = 0; j < kTN; ++j) {
          sums[i][j] = fmaf(p_tile[k][ty + 16 * i], q_tile[k][tx + 16 * j], sums[i][j]);
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

// out = alpha * the sum of the slices, in slice order.
__global__ void lowrank_sum_slices(Matrix out, const float* partial, int64_t slices, float alpha) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t size = out.rows * out.cols;
  if (e >= size) return;
  float total = 0.0f;
  for (int64_t s = 0; s < slices; ++s) total += partial[s * size + e];
  store(out, e / out.cols, e % out.cols, alpha * total);
}

int64_t num_slices(int64_t depth) {
  return depth <= kSlice ? 1 : ceil_div(depth, kSlice);
}

template <int kBM, int kBN, bool kAccumulate>
void launch_product(const Matrix& out, const Matrix& p, const Matrix& q, float alpha, float* workspace, int device,
                    uintptr_t stream_address) {
  if (out.rows == 0 || out.cols == 0) return;
  const DeviceScope scope(kOp, device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const int64_t slices = kAccumulate ? 1 : num_slices(p.cols);
  const dim3 grid(grid_size(kOp, ceil_div(out.rows, kBM), kGridX), grid_size(kOp, ceil_div(out.cols, kBN), kGridY),
                  grid_size(kOp, slices, kGridY));
  lowrank_product<kBM, kBN, kAccumulate>
      <<<grid, kThreads, 0, stream>>>(out, p, q, alpha, slices == 1 ? p.cols : kSlice, workspace);
  check_launch(kOp);
  if (slices == 1) return;
  lowrank_sum_slices<<<grid_size(kOp, ceil_div(out.rows * out.cols, kThreads), kGridX), kThreads, 0, stream>>>(
      out, workspace, slices, alpha);
  check_launch(kOp);
}

}  // namespace

int64_t lowrank_workspace_floats(int64_t rows, int64_t cols, int64_t depth) {
  const int64_t slices = num_slices(depth);
  return slices == 1 ? 0 : slices * rows * cols;
}

void lowrank_expand_cuda(const Matrix& out, const Matrix& left, const Matrix& right, float alpha, int device,
                         uintptr_t stream) {
  launch_product<64, 64, true>(out, left, right, alpha, nullptr, device, stream);
}

void lowrank_project_cuda(const Matrix& out, const Matrix& x, const Matrix& small, float alpha, float* workspace,
                          int device, uintptr_t stream) {
  launch_product<64, 16, false>(out, x, small, alpha, workspace, device, stream);
}

void lowrank_gradient_cuda(const Matrix& out, const Matrix& left, const Matrix& x, float alpha, float* workspace,
                           int device, uintptr_t stream) {
  const Matrix transposed = {left.data, left.cols, left.rows, left.col_stride, left.row_stride, left.dtype};
  launch_product<16, 64, false>(out, transposed, x, alpha, workspace, device, stream);
}

}  // namespace fedspine
