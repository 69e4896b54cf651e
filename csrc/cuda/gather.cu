// Contiguous copies of selected rows or columns of a matrix on CUDA. Reference implementation: gather_range in
// csrc/cpu/gather.cpp.
//
// Versions:
//   naive/gather.cu   one thread per element of the output
//   this file         adds a loop over elements with a bounded grid, so the size of the output is not limited
//
// ops.gather_rows and ops.gather_cols do not call it: torch's index_select is the same copy, bound by memory bandwidth,
// and no measurement on a GPU shows a gain. benchmarks/kernels.py compares the two. The caller has validated the
// indices.
#include "common.cuh"

namespace fedspine {
namespace {

constexpr int kThreads = 256;

// Neighbouring threads write neighbouring elements of the output, which is contiguous.
template <typename T>
__global__ void gather_elements(Matrix out, Matrix in, const int64_t* index, bool by_row) {
  const int64_t size = out.rows * out.cols, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t e = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; e < size; e += step) {
    const int64_t row = e / out.cols, col = e % out.cols;
    *element<T>(out, row, col) = by_row ? *element<T>(in, index[row], col) : *element<T>(in, row, index[col]);
  }
}

}  // namespace

void gather_cuda(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int item_bytes, int device,
                 uintptr_t stream_address) {
  const char* op = by_row ? "gather_rows" : "gather_cols";
  const DeviceScope scope(op, device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const int64_t size = out.rows * out.cols;
  if (size == 0) return;
  const int64_t blocks = ceil_div(size, kThreads);
  const auto kernel = item_bytes == 1   ? gather_elements<uint8_t>
                      : item_bytes == 2 ? gather_elements<uint16_t>
                      : item_bytes == 4 ? gather_elements<uint32_t>
                                        : gather_elements<uint64_t>;
  launch(op, kernel, static_cast<unsigned>(blocks < 65536 ? blocks : 65536), kThreads, stream, out, in, index, by_row);
}

}  // namespace fedspine
