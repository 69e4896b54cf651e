// RMS norm and SwiGLU on the CPU: rows to threads. The loops are in elementwise.inc.
#include "../kernels.h"
#include "parallel.h"
#include "tiles.h"

namespace fedspine {
namespace {

// Work per element in multiply-adds, which parallel_for counts in. Low on purpose: both ops wait for memory, which
// threads share.
constexpr double kNorm = 4, kGate = 16;

template <typename Args>
void by_rows(const Matrix& shape, double cost, int threads, const Args& args,
             void (*run)(const Args&, int64_t, int64_t)) {
  parallel_for(shape.rows, threads, cost * static_cast<double>(shape.rows) * static_cast<double>(shape.cols),
               [&](int64_t first, int64_t last) { run(args, first, last); });
}

}  // namespace

void rms_norm_cpu(const Matrix& out, float* rstd, const Matrix& x, const Matrix& weight, float epsilon, int threads) {
  by_rows(x, kNorm, threads, RmsNormArgs{out, {}, x, weight, epsilon, rstd}, tiles().rms_norm);
}

void rms_norm_backward_cpu(const Matrix& grad_x, const Matrix& grad, const Matrix& x, const Matrix& weight, float* rstd,
                           int threads) {
  by_rows(x, kNorm, threads, RmsNormArgs{grad_x, grad, x, weight, 0.0f, rstd}, tiles().rms_norm_backward);
}

void swiglu_cpu(const Matrix& out, const Matrix& gate, const Matrix& up, int threads) {
  by_rows(gate, kGate, threads, SwigluArgs{out, {}, {}, gate, up}, tiles().swiglu);
}

void swiglu_backward_cpu(const Matrix& grad_gate, const Matrix& grad_up, const Matrix& grad, const Matrix& gate,
                         const Matrix& up, int threads) {
  by_rows(gate, kGate, threads, SwigluArgs{grad_gate, grad_up, grad, gate, up}, tiles().swiglu_backward);
}

}  // namespace fedspine
