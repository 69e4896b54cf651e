// Naive gather: one thread per element of the output. The tests compare the fast version with it; see
// csrc/cuda/gather.cu for the list of versions.
#include "../common.cuh"

namespace fedspine {
namespace {

template <typename T>
__global__ void gather_naive(Matrix out, Matrix in, const int64_t* index, bool by_row) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (e >= out.rows * out.cols) return;
  const int64_t row = e / out.cols, col = e % out.cols;
  *element<T>(out, row, col) = *element<T>(in, by_row ? index[row] : row, by_row ? col : index[col]);
}

}  // namespace

void gather_naive_cuda(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int item_bytes,
                       int device, uintptr_t stream) {
  const char* op = by_row ? "gather_rows" : "gather_cols";
  if (out.rows == 0 || out.cols == 0) return;
  const DeviceScope scope(op, device);
  const auto kernel = item_bytes == 1   ? gather_naive<uint8_t>
                      : item_bytes == 2 ? gather_naive<uint16_t>
                      : item_bytes == 4 ? gather_naive<uint32_t>
                                        : gather_naive<uint64_t>;
  launch(op, kernel, grid_size(op, ceil_div(out.rows * out.cols, 256), kGridX), 256,
         reinterpret_cast<cudaStream_t>(stream), out, in, index, by_row);
}

}  // namespace fedspine
