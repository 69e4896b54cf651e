// Shared by all CUDA kernels: kernel launches and their errors, the current device, and conversion between storage and
// float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../kernels.h"

// A variable in the shared memory of a block. tests/kernels/cuda_on_cpu defines this macro differently: there every
// block gets newly allocated, guarded memory.
#ifdef __CUDACC__
#define FEDSPINE_SHARED(Type, name) __shared__ Type name
#endif

namespace fedspine {
namespace {

inline void check(const char* op, const char* what, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + what + " failed: " + cudaGetErrorName(status) + ": " +
                           cudaGetErrorString(status));
}

// Launch a kernel on the stream. Unlike <<<>>>, this form returns its error, and a C++ compiler without CUDA accepts
// it.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
            Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (status != cudaSuccess) cudaGetLastError();  // clear the error, so that torch does not report it again
  check(op, "kernel launch", status);
}

// Makes `device` the current one for a scope. The tensors of a call may be on another GPU than the thread's current
// one.
class DeviceScope {
 public:
  DeviceScope(const char* op, int device) {
    check(op, "cudaGetDevice", cudaGetDevice(&previous_));
    if (previous_ != device) check(op, "cudaSetDevice", cudaSetDevice(device));
    changed_ = previous_ != device;
  }
  ~DeviceScope() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Return the number of blocks as a grid dimension. Grids are computed in 64 bits and checked, so they cannot overflow.
inline unsigned grid_size(const char* op, int64_t blocks, int64_t limit) {
  if (blocks > limit) throw std::invalid_argument(std::string(op) + ": the matrix needs more blocks than a grid holds");
  return static_cast<unsigned>(blocks);
}
constexpr int64_t kGridX = 2147483647, kGridY = 65535;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(__half x) {
  return __half2float(x);
}
__device__ inline float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ inline void from_float(float x, float* out) {
  *out = x;
}
__device__ inline void from_float(float x, __half* out) {
  *out = __float2half_rn(x);
}
__device__ inline void from_float(float x, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(x);
}

template <typename T>
__device__ inline T* element(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<T*>(m.data) + row * m.row_stride + col * m.col_stride;
}

// The dtype is the same for all threads of a launch, so these branches do not diverge.
__device__ inline float load(const Matrix& m, int64_t row, int64_t col) {
  if (m.dtype == DType::f32) return *element<float>(m, row, col);
  if (m.dtype == DType::f16) return to_float(*element<__half>(m, row, col));
  return to_float(*element<__nv_bfloat16>(m, row, col));
}

__device__ inline void store(const Matrix& m, int64_t row, int64_t col, float value) {
  if (m.dtype == DType::f32) return from_float(value, element<float>(m, row, col));
  if (m.dtype == DType::f16) return from_float(value, element<__half>(m, row, col));
  return from_float(value, element<__nv_bfloat16>(m, row, col));
}

}  // namespace
}  // namespace fedspine
