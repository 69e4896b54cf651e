// What the kernels of csrc/cuda use of CUDA, on a CPU, for tests: the very same .cu files compile with g++ -x c++ and
// -I on this folder. Blocks run one after another; the threads of a block are fibers that change places only at
// barriers, at warp collectives and at the end, in an order the test chooses. Not a GPU: no speed, no memory model
// weaker than "anything between two barriers in any order of whole threads", no limits of registers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

// For functions that combine the operands of a warp's lanes: they read other threads' stacks, as no kernel does.
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

// Set by the scheduler whenever a thread gets its turn.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulated {

struct Order {
  unsigned seed;    // 0: threads and blocks ascending, 1: descending, others: shuffled
  bool late_async;  // cp.async lands at the wait that asks for it rather than at once
};
extern Order order;

// Shared memory of a block: fresh bytes of 0xff (NaN in every format), of exactly this size, at the first call of any
// of its threads. `site` tells the variables of a kernel apart.
void* shared_memory(size_t bytes, const void* site);

// Waits for every thread of the block; line is where, and all must be at the same.
void block_barrier(int line);
int block_or(int bits, int line);

// Waits for the 32 lanes of the warp, each with its operands; the last to come calls combine(operands of all lanes).
void warp_collective(const char* name, void* operands, void (*combine)(void* const* lanes));
void warp_barrier();
int lane();

// cp.async of 16 bytes: `perform` runs at once or at the wait that covers it, as `order` says.
void async_copy(void* shared, const void* global, int bytes,
                void (*perform)(void* shared, const void* global, int bytes));
void async_commit();
void async_wait(size_t groups);  // until at most so many committed groups are in flight

int launch(dim3 grid, dim3 block, const std::function<void()>& kernel);  // 0, or the number of a cudaError_t

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

// The runtime API: one device, one stream that is done when a call returns.
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
