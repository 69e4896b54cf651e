// Emulation of the parts of CUDA that the kernels of csrc/cuda use, for tests on a CPU. g++ -x c++ compiles the same
// .cu files with this folder on its include path. Blocks run one after another. The threads of a block are fibers that
// switch only at barriers, at warp collectives and at their end, in an order that the test selects. The emulation does
// not model speed, limits of registers, or a memory model weaker than whole threads in any order between two barriers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

// Marks functions that combine the operands of a warp. They read the stacks of other threads, which no kernel does.
#define EMULATED_HARDWARE __attribute__((no_sanitize("thread")))

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Set by the scheduler before a thread runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulated {

struct Order {
  unsigned seed;    // order of threads and blocks: 0 ascending, 1 descending, others shuffled
  bool late_async;  // cp.async lands at the wait that covers it instead of at once
};
extern Order order;

// Return a variable in the shared memory of a block. The first call of any thread allocates exactly this size, filled
// with 0xff (NaN in every format). `site` identifies the variable.
void* shared_memory(size_t bytes, const void* site);

// Wait for every thread of the block. All threads must wait in the same line of the source.
void block_barrier(int line);
int block_or(int bits, int line);

// Wait for the 32 lanes of the warp. The last one to arrive calls combine with the operands of all lanes.
void warp_collective(const char* name, void* operands, void (*combine)(void* const* lanes));
void warp_barrier();
int lane();

// Start an asynchronous copy of 16 bytes. `perform` runs at once or at the wait that covers it, depending on `order`.
void async_copy(void* shared, const void* global, int bytes,
                void (*perform)(void* shared, const void* global, int bytes));
void async_commit();
void async_wait(size_t groups);  // wait until at most this many committed groups are in flight

int launch(dim3 grid, dim3 block, const std::function<void()>& kernel);  // returns 0 or a cudaError_t

}  // namespace emulated

#define FEDSPINE_SHARED(Type, name)  \
  static const char name##_site = 0; \
  Type& name = *static_cast<Type*>(emulated::shared_memory(sizeof(Type), &name##_site))

inline void __syncthreads(int line = __builtin_LINE()) {
  emulated::block_barrier(line);
}
inline int __syncthreads_or(int bits, int line = __builtin_LINE()) {
  return emulated::block_or(bits, line);
}
inline void __syncwarp() {
  emulated::warp_barrier();
}

namespace emulated {
template <typename T>
struct Shuffle {
  T value, result;
  int from;
};
template <typename T>
T shuffle(T value, int from) {
  Shuffle<T> mine = {value, value, from};
  warp_collective("shuffle", &mine, [](void* const* lanes) EMULATED_HARDWARE {
    for (int i = 0; i < 32; ++i) {
      auto* lane = static_cast<Shuffle<T>*>(lanes[i]);
      lane->result = static_cast<Shuffle<T>*>(lanes[lane->from])->value;
    }
  });
  return mine.result;
}
}  // namespace emulated

template <typename T>
T __shfl_down_sync(unsigned, T value, int offset, int width = 32) {
  const int lane = emulated::lane(), from = lane + offset;
  return emulated::shuffle(value, from / width == lane / width ? from : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated::shuffle(value, emulated::lane() ^ mask);
}

inline unsigned __ballot_sync(unsigned, bool bit) {
  unsigned bits = bit ? 1u << emulated::lane() : 0u;
  for (int offset = 16; offset > 0; offset /= 2) bits |= __shfl_xor_sync(0xffffffffu, bits, offset);
  return bits;
}
inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}
inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The runtime API, with one device and one stream whose work is complete when a call returns.
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};
inline const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorInvalidConfiguration ? "cudaErrorInvalidConfiguration" : "cudaErrorInvalidValue";
}
inline const char* cudaGetErrorString(cudaError_t) {
  return "in the emulation";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  return static_cast<cudaError_t>(
      emulated::launch(config->gridDim, config->blockDim, [&] { kernel(Expected(arguments)...); }));
}
