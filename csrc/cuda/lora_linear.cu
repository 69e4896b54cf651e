// The low-rank products of lora_linear on CUDA: out = alpha left right, added to out for expand.
//
// Versions:
//   naive/lora_linear.cu   one thread per element of the result, in double
//   lora_linear_fma.cuh    adds tiles in shared memory and slices of a long inner dimension
//   lora_linear_mma.cuh    adds tensor cores and double-buffered asynchronous copies, for one 16-bit format
//
// A product with a long inner dimension is cut into slices, whose number depends on the shapes alone. A second launch
// adds them in slice order. There are no float atomics, so the result has the same bits on every run and every GPU of
// one kind. Nothing is copied back to the host, so the launches can be captured into a CUDA graph.
#include "lora_linear_fma.cuh"
#include "lora_linear_mma.cuh"

namespace fedspine {
namespace {

constexpr const char* kOp = "lora_linear";
constexpr int64_t kSlice = 512;  // inner elements per slice: enough steps to amortise the write of a partial sum
constexpr int kSumThreads = 256;

// Compute out = alpha times the sum of the slices, in slice order.
__global__ void __launch_bounds__(kSumThreads)
    lora_linear_sum_slices(Matrix out, const float* partial, int64_t slices, float alpha) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t size = out.rows * out.cols;
  if (e >= size) return;
  float total = 0.0f;
  for (int64_t slice = 0; slice < slices; ++slice) total += partial[slice * size + e];
  store(out, e / out.cols, e % out.cols, alpha * total);
}

int64_t num_slices(int64_t depth) {
  return depth <= kSlice ? 1 : ceil_div(depth, kSlice);
}

Matrix transposed(const Matrix& m) {
  return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype};
}

Operand operand(const Matrix& m) {
  const bool aligned = is_aligned(m);
  return {m, aligned ? aligned_rows(m) : AlignedRows{}, aligned};
}

struct Product {
  Matrix out, left, right;
  float alpha;
  float* workspace;
  cudaStream_t stream;
  bool accumulate;

  int64_t slices() const { return accumulate ? 1 : num_slices(left.cols); }
  int64_t slice_depth() const { return slices() == 1 ? left.cols : kSlice; }
  dim3 grid(int64_t tile_rows, int64_t tile_cols) const {
    return dim3(grid_size(kOp, ceil_div(out.rows, tile_rows), kGridX),
                grid_size(kOp, ceil_div(out.cols, tile_cols), kGridY), grid_size(kOp, slices(), kGridY));
  }
};

template <int kTileRows, int kTileCols, bool kAccumulate>
void launch_fma(const Product& x) {
  launch(kOp, lora_linear_fma<kTileRows, kTileCols, kAccumulate>, x.grid(kTileRows, kTileCols), kLoraLinearFmaThreads,
         x.stream, x.out, x.left, x.right, x.alpha, x.slice_depth(), x.workspace);
}

template <typename T, int kTileRows, int kTileCols, int kDepth, bool kLeftTransposed, bool kRightTransposed,
          bool kAccumulate>
void launch_mma(const Product& x) {
  launch(kOp, lora_linear_mma<T, kTileRows, kTileCols, kDepth, kLeftTransposed, kRightTransposed, kAccumulate>,
         x.grid(kTileRows, kTileCols), kLoraLinearMmaThreads, x.stream, operand(x.out),
         operand(kLeftTransposed ? transposed(x.left) : x.left),
         operand(kRightTransposed ? transposed(x.right) : x.right), static_cast<int>(x.left.cols), x.alpha,
         static_cast<int>(x.slice_depth()), x.workspace);
}

// The right operand is contiguous along the inner dimension (A in x Aᵀ, B in h Bᵀ) or along the other one (B in dY B, A
// in dh A).
template <typename T>
void expand_mma(const Product& x) {
  const auto run = x.right.row_stride == 1 ? launch_mma<T, 64, 64, 16, false, true, true>
                                           : launch_mma<T, 64, 64, 16, false, false, true>;
  run(x);
}

template <typename T>
void project_mma(const Product& x) {
  const bool by_inner = x.right.row_stride == 1;
  const auto run =
      x.out.cols <= 16
          ? (by_inner ? launch_mma<T, 64, 16, 64, false, true, false> : launch_mma<T, 64, 16, 64, false, false, false>)
          : (by_inner ? launch_mma<T, 64, 64, 64, false, true, false> : launch_mma<T, 64, 64, 64, false, false, false>);
  run(x);
}

template <typename T>
void gradient_mma(const Product& x) {
  const auto run =
      x.out.rows <= 16 ? launch_mma<T, 16, 64, 64, true, false, false> : launch_mma<T, 64, 64, 64, true, false, false>;
  run(x);
}

using Launch = void (*)(const Product&);

void run(const Product& x, bool tensor_cores, int device, Launch half, Launch bfloat16, Launch fma) {
  if (x.out.rows == 0 || x.out.cols == 0 || (x.accumulate && x.left.cols == 0)) return;
  const DeviceScope scope(kOp, device);
  if (tensor_cores) {
    const bool one_dtype = x.left.dtype != DType::f32 && x.left.dtype == x.right.dtype;
    if (!one_dtype || (x.accumulate && x.out.dtype != x.left.dtype)) {
      throw std::invalid_argument("lora_linear: tensor cores need one 16-bit dtype for all matrices of a product");
    }
    for (const int64_t size : {x.out.rows, x.out.cols, x.left.cols}) {
      if (size >= kMaxSize) throw std::invalid_argument("lora_linear: a matrix has 2^31 rows or columns or more");
    }
    (x.left.dtype == DType::f16 ? half : bfloat16)(x);
  } else {
    fma(x);
  }
  if (x.slices() == 1) return;
  launch(kOp, lora_linear_sum_slices, grid_size(kOp, ceil_div(x.out.rows * x.out.cols, kSumThreads), kGridX),
         kSumThreads, x.stream, x.out, x.workspace, x.slices(), x.alpha);
}

cudaStream_t stream_of(uintptr_t address) {
  return reinterpret_cast<cudaStream_t>(address);
}

}  // namespace

int64_t lora_linear_workspace_floats(int64_t rows, int64_t cols, int64_t depth) {
  const int64_t slices = num_slices(depth);
  return slices == 1 ? 0 : slices * rows * cols;
}

void lora_linear_expand_cuda(const Matrix& out, const Matrix& left, const Matrix& right, float alpha, bool tensor_cores,
                             int device, uintptr_t stream) {
  run({out, left, right, alpha, nullptr, stream_of(stream), true}, tensor_cores, device, expand_mma<__half>,
      expand_mma<__nv_bfloat16>, launch_fma<64, 64, true>);
}

void lora_linear_project_cuda(const Matrix& out, const Matrix& x, const Matrix& small, float alpha, bool tensor_cores,
                              float* workspace, int device, uintptr_t stream) {
  run({out, x, small, alpha, workspace, stream_of(stream), false}, tensor_cores, device, project_mma<__half>,
      project_mma<__nv_bfloat16>, launch_fma<64, 16, false>);
}

void lora_linear_gradient_cuda(const Matrix& out, const Matrix& left, const Matrix& x, float alpha, bool tensor_cores,
                               float* workspace, int device, uintptr_t stream) {
  run({out, transposed(left), x, alpha, workspace, stream_of(stream), false}, tensor_cores, device,
      gradient_mma<__half>, gradient_mma<__nv_bfloat16>, launch_fma<16, 64, false>);
}

}  // namespace fedspine
