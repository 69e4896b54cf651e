// What the emulated extension module has beyond the kernels: the order of threads, for tests to choose, and the CPU
// side of csrc/bindings.cpp, which is not built here.
#include <stdexcept>

#include "cuda_runtime.h"
#include "kernels.h"

extern "C" void emulation_order(unsigned seed, int late_async) {
  emulated::order = {seed, late_async != 0};
}

namespace fedspine {
namespace {
[[noreturn]] void absent() {
  throw std::runtime_error("the emulation has CUDA kernels only");
}
}  // namespace
void importance_accumulate_cpu(const ImportanceArgs&, int) {
  absent();
}
void lowrank_project_cpu(const Matrix&, const Matrix&, const Matrix&, float, int) {
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
