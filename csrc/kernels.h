// The native ops of fedspine_edge: the one interface between Python and the C++ and CUDA kernels.
//
// The kernels do not depend on torch. A tensor arrives as a pointer with sizes, strides and a dtype. Python allocates
// outputs and workspaces and passes the CUDA stream that the work is queued on. Every function throws
// std::invalid_argument for an invalid argument and std::runtime_error for a failed launch; both messages begin with
// the name of the op.
#pragma once

#include <cstdint>
#include <string>

namespace fedspine {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };
enum class Metric : int { abs = 0, square = 1, signed_ = 2 };

// A strided matrix that the caller owns. Strides count elements, not bytes, and may be 0 or negative.
struct Matrix {
  void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  DType dtype;
};

// The sum over each group of metric(Ghat * (W + scaling B A)), with Ghat = gB A + B gA - gB gA.
// W is (out, in), A and gA are (r, in), B and gB are (out, r); each has its own dtype. Row i belongs to group[i], or
// column i does if by_row is false. scores holds num_groups floats and is overwritten.
struct ImportanceArgs {
  Matrix weight, lora_a, lora_b, grad_a, grad_b;
  float scaling;
  const int32_t* group;
  bool by_row;
  int64_t num_groups;
  Metric metric;
  float* scores;
};

void importance_accumulate_cpu(const ImportanceArgs& args, int threads);

// The low-rank products of lora_linear. Together with the base GEMM they give its forward and backward pass:
//   expand    C (m, n)  += alpha * L (m, r) R (r, n)         y += s h Bᵀ,  dX += dh A
//   project   H (m, r)   = alpha * X (m, k) S (k, r)         h = x Aᵀ,     dh = s dy B
//   gradient  G (r, n)   = alpha * Lᵀ (r, m) X (m, n)        dA = dhᵀ x,   dBᵀ = s hᵀ dy
// Each matrix has its own dtype; sums are fp32. The CPU has only project, because torch's BLAS is faster at the other
// two (docs/decisions/0010).
void lora_linear_project_cpu(const Matrix& out, const Matrix& x, const Matrix& small, float alpha, int threads);

// The norm and the gate of a decoder in fp32. They read every operand once. The elements of a row are contiguous,
// weight has one row, and rstd holds one float per row. There is no CUDA version: torch has its own kernels there.
//   rms_norm           out = w x rstd, rstd = 1 / sqrt(mean(x²) + epsilon)
//   rms_norm_backward  grad_x = rstd (w g - x rstd² mean(w g x))
//   swiglu             out = silu(gate) up
//   swiglu_backward    grad_gate = g up silu'(gate), grad_up = g silu(gate)
void rms_norm_cpu(const Matrix& out, float* rstd, const Matrix& x, const Matrix& weight, float epsilon, int threads);
void rms_norm_backward_cpu(const Matrix& grad_x, const Matrix& grad, const Matrix& x, const Matrix& weight, float* rstd,
                           int threads);
void swiglu_cpu(const Matrix& out, const Matrix& gate, const Matrix& up, int threads);
void swiglu_backward_cpu(const Matrix& grad_gate, const Matrix& grad_up, const Matrix& grad, const Matrix& gate,
                         const Matrix& up, int threads);

// out[i, :] = in[index[i], :], or out[:, i] = in[:, index[i]] if by_row is false. item_bytes is 1, 2, 4 or 8; the
// strides of both matrices count elements of that size, and their dtype is ignored.
void gather_cpu(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int item_bytes, int threads);

// Return the instruction set that was selected at run time: avx512, avx2, neon or baseline.
std::string cpu_isa();

#ifdef FEDSPINE_WITH_CUDA
// stream is a cudaStream_t as an integer, device the ordinal of the GPU that holds the tensors. A workspace is
// uninitialised device memory of at least the number of floats that the matching function returns. tensor_cores
// requires one 16-bit dtype for all matrices of an op, except for the results of project and gradient, which may be
// fp32.
int64_t importance_accumulate_workspace_floats(int64_t rows, int64_t cols, int64_t rank, bool by_row);
void importance_accumulate_cuda(const ImportanceArgs& args, bool tensor_cores, float* workspace, int device,
                                uintptr_t stream);

// The workspace of a (rows, depth) x (depth, cols) product.
int64_t lora_linear_workspace_floats(int64_t rows, int64_t cols, int64_t depth);
void lora_linear_expand_cuda(const Matrix& out, const Matrix& left, const Matrix& right, float alpha, bool tensor_cores,
                             int device, uintptr_t stream);
void lora_linear_project_cuda(const Matrix& out, const Matrix& x, const Matrix& small, float alpha, bool tensor_cores,
                              float* workspace, int device, uintptr_t stream);
void lora_linear_gradient_cuda(const Matrix& out, const Matrix& left, const Matrix& x, float alpha, bool tensor_cores,
                               float* workspace, int device, uintptr_t stream);
void gather_cuda(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int item_bytes, int device,
                 uintptr_t stream);

// Naive kernels (csrc/cuda/naive) with one thread per result and sums in double. Only the tests call them, as a second
// oracle beside float64 torch. lora_linear_product computes alpha * left right and adds it to out if accumulate is
// true.
void importance_accumulate_naive_cuda(const ImportanceArgs& args, int device, uintptr_t stream);
void lora_linear_product_naive_cuda(const Matrix& out, const Matrix& left, const Matrix& right, float alpha,
                                    bool accumulate, int device, uintptr_t stream);
void gather_naive_cuda(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int item_bytes,
                       int device, uintptr_t stream);

int cuda_runtime_version();
#endif

}  // namespace fedspine
