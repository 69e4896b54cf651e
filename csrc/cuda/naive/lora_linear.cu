// Naive product of lora_linear: one thread per element of the result, in double. With transposed operands it computes
// expand, project and gradient. The tests compare the fast versions with it; see csrc/cuda/lora_linear.cu for the list
// of versions.
#include "../common.cuh"

namespace fedspine {
namespace {

__global__ void lora_linear_product_naive(Matrix out, Matrix left, Matrix right, float alpha, bool accumulate) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= out.rows * out.cols) return;
  const int64_t row = e / out.cols, col = e % out.cols;
  double sum = 0.0;
  for (int64_t k = 0; k < left.cols; ++k) sum += static_cast<double>(load(left, row, k)) * load(right, k, col);
  const double value = alpha * sum + (accumulate ? load(out, row, col) : 0.0);
  store(out, row, col, static_cast<float>(value));
}

}  // namespace

void lora_linear_product_naive_cuda(const Matrix& out, const Matrix& left, const Matrix& right, float alpha,
                                    bool accumulate, int device, uintptr_t stream) {
  const char* op = "lora_linear";
  if (out.rows == 0 || out.cols == 0) return;
  const DeviceScope scope(op, device);
  launch(op, lora_linear_product_naive, grid_size(op, ceil_div(out.rows * out.cols, 256), kGridX), 256,
         reinterpret_cast<cudaStream_t>(stream), out, left, right, alpha, accumulate);
}

}  // namespace fedspine
