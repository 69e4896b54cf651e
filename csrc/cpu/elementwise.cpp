// RMS norm and SwiGLU on the CPU: distributes rows over threads. The loops are in elementwise.inc. There is no CUDA
// version.
#include "../kernels.h"
#include "isa_table.h"
#include "parallel.h"

namespace fedspine {
namespace {

// Work per element in multiply-adds, the unit of parallel_for. The values are low because both ops are bound by memory
// bandwidth, which the threads share.
constexpr double kNormCost = 4, kGateCost = 16;

template <typename Args>
void for_row_ranges(const Matrix& shape, double cost, int threads, const Args& args,
                    void (*run)(const Args&, int64_t, int64_t)) {
  parallel_for(shape.rows, threads, cost * static_cast<double>(shape.rows) * static_cast<double>(shape.cols),
               [&](int64_t first, int64_t last) { run(args, first, last); });
}

}  // namespace

void rms_norm_cpu(const Matrix& out, float* rstd, const Matrix& x, const Matrix& weight, float epsilon, int threads) {
  for_row_ranges(x, kNormCost, threads, RmsNormArgs{out, {}, x, weight, epsilon, rstd}, isa_table().rms_norm);
}

void rms_norm_backward_cpu(const Matrix& grad_x, const Matrix& grad, const Matrix& x, const Matrix& weight, float* rstd,
                           int threads) {
  for_row_ranges(x, kNormCost, threads, RmsNormArgs{grad_x, grad, x, weight, 0.0f, rstd},
                 isa_table().rms_norm_backward);
}

void swiglu_cpu(const Matrix& out, const Matrix& gate, const Matrix& up, int threads) {
  for_row_ranges(gate, kGateCost, threads, SwigluArgs{out, {}, {}, gate, up}, isa_table().swiglu);
}

void swiglu_backward_cpu(const Matrix& grad_gate, const Matrix& grad_up, const Matrix& grad, const Matrix& gate,
                         const Matrix& up, int threads) {
  for_row_ranges(gate, kGateCost, threads, SwigluArgs{grad_gate, grad_up, grad, gate, up}, isa_table().swiglu_backward);
}

}  // namespace fedspine
