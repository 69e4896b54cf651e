// The parts of the emulated extension module that are not CUDA kernels: the order of threads, which tests select, and
// stubs for the CPU kernels that csrc/bindings.cpp refers to.
#include <stdexcept>

#include "cuda_runtime.h"
#include "kernels.h"

extern "C" void emulation_order(unsigned seed, int late_async) {
  emulated::order = {seed, late_async != 0};
}

namespace fedspine {
namespace {
[[noreturn]] void absent() {
  throw std::runtime_error("the emulation contains CUDA kernels only");
}
}  // namespace
void importance_accumulate_cpu(const ImportanceArgs&, int) {
  absent();
}
void lora_linear_project_cpu(const Matrix&, const Matrix&, const Matrix&, float, int) {
  absent();
}
void gather_cpu(const Matrix&, const Matrix&, const int64_t*, bool, int, int) {
  absent();
}
void rms_norm_cpu(const Matrix&, float*, const Matrix&, const Matrix&, float, int) {
  absent();
}
void rms_norm_backward_cpu(const Matrix&, const Matrix&, const Matrix&, const Matrix&, float*, int) {
  absent();
}
void swiglu_cpu(const Matrix&, const Matrix&, const Matrix&, int) {
  absent();
}
void swiglu_backward_cpu(const Matrix&, const Matrix&, const Matrix&, const Matrix&, const Matrix&, int) {
  absent();
}
std::string cpu_isa() {
  return "";
}
}  // namespace fedspine
