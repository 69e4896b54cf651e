// The native ops of fedspine_edge: what crosses the border between Python and C++/CUDA.
//
// Nothing here knows torch. Tensors arrive as pointers, sizes, strides and a dtype; outputs and workspaces are
// allocated by Python; CUDA work goes to the stream Python names. Every function throws std::invalid_argument for
// a wrong argument and std::runtime_error for a failed launch, both with the op's name in the message.
#pragma once

#include <cstdint>
#include <string>

namespace fedspine {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };
enum class Metric : int { abs = 0, square = 1, signed_ = 2 };

// A strided matrix in somebody else's memory; strides count elements, not bytes, and may be 0 or negative.
struct Matrix {
  void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
  DType dtype;
};

// Sum over each group of metric(Ghat * (W + scaling B A)), Ghat = gB A + B gA - gB gA.
// W (out, in); A, gA (r, in); B, gB (out, r), each of its own dtype. Group of row i (or of column i when not
// by_row): group[i]. scores: num_groups float32, overwritten.
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

// The low-rank half of lora_linear, three products that together with the base GEMM give forward and backward:
//   expand    C (m, n)  += alpha * L (m, r) R (r, n)         y += s h Bᵀ,  dX += dh A
//   project   H (m, r)   = alpha * X (m, k) S (k, r)         h = x Aᵀ,     dh = s dy B
//   gradient  G (r, n)   = alpha * Lᵀ (r, m) X (m, n)        dA = dhᵀ x,   dBᵀ = s hᵀ dy
// Each matrix has its own dtype; sums are fp32. On the CPU torch's BLAS is the faster one for expand and gradient, so
// only project is there.
void lowrank_project_cpu(const Matrix& out, const Matrix& x, const Matrix& small, float alpha, int threads);

// Norm and gate of a decoder in fp32, row by row with one read of every operand. The elements of a row lie next to one
// another; weight is one row; rstd holds a float per row.
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

// out[i, :] = in[index[i], :] or out[:, i] = in[:, index[i]], any element of item_bytes 1, 2, 4 or 8.
// `in` and `out` are described in elements of item_bytes; the dtype field is not read.
void gather_cpu(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int item_bytes, int threads);

std::string cpu_isa();  // the instruction set chosen at run time: avx512, avx2, neon or baseline

#ifdef FEDSPINE_WITH_CUDA
// `stream` is a cudaStream_t as an integer, `device` the ordinal the pointers live on.
// Workspaces are uninitialised device memory of at least the number of floats asked for.
int64_t importance_workspace_floats(int64_t rows, int64_t cols, int64_t rank, bool by_row);
// `tensor_cores` needs all matrices of an op in one 16-bit dtype; the results of project and gradient may be fp32.
void importance_accumulate_cuda(const ImportanceArgs& args, bool tensor_cores, float* workspace, int device,
                                uintptr_t stream);
int64_t lowrank_workspace_floats(int64_t rows, int64_t cols,
                                 int64_t depth);  // of an (rows, depth) (depth, cols) product
void lowrank_expand_cuda(const Matrix& out, const Matrix& left, const Matrix& right, float alpha, bool tensor_cores,
                         int device, uintptr_t stream);
void lowrank_project_cuda(const Matrix& out, const Matrix& x, const Matrix& small, float alpha, bool tensor_cores,
                          float* workspace, int device, uintptr_t stream);
void lowrank_gradient_cuda(const Matrix& out, const Matrix& left, const Matrix& x, float alpha, bool tensor_cores,
                           float* workspace, int device, uintptr_t stream);
void gather_cuda(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int item_bytes, int device,
                 uintptr_t stream);
int cuda_runtime_version();
#endif

}  // namespace fedspine
