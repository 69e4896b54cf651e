// Kernels with one deliberate fault each, which the emulation must report. Arguments: the name of the fault, the seed
// of the order of threads, and whether cp.async is late. Prints the result.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "cuda/common.cuh"
#include "cuda/ptx.cuh"

namespace {

struct __align__(16) Floats {
  float values[64];
};

// Every thread writes a value and reads that of the opposite thread. In "race" the barrier between them is missing.
void exchange(float* out, bool barrier) {
  FEDSPINE_SHARED(Floats, shared);
  shared.values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = shared.values[63 - threadIdx.x];
}

// Reads the result of cp.async. In "unwaited" the wait is missing.
void copy(const float* in, float* out, bool wait) {
  FEDSPINE_SHARED(Floats, shared);
  if (threadIdx.x < 16) fedspine::cp_async_16(&shared.values[4 * threadIdx.x], in + 4 * threadIdx.x, 16);
  fedspine::cp_async_commit();
  if (wait) {
    fedspine::cp_async_commit();
    fedspine::cp_async_wait_all_but_one();
  }
  __syncthreads();
  out[threadIdx.x] = shared.values[threadIdx.x];
  fedspine::cp_async_commit();
  fedspine::cp_async_wait_all_but_one();
}

void divergent_barrier(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 0.0f;
}

void divergent_warp(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1);
}

void misaligned(const float* in, float* out) {
  FEDSPINE_SHARED(Floats, shared);
  fedspine::cp_async_16(&shared.values[0], in + 1, 16);
  fedspine::cp_async_commit();
  fedspine::cp_async_commit();
  fedspine::cp_async_wait_all_but_one();
  out[threadIdx.x] = shared.values[0];
}

void outside_shared(float* out) {
  FEDSPINE_SHARED(Floats, shared);
  const float* values = shared.values;
  out[threadIdx.x] = values[threadIdx.x + 1];
}

void outside_global(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x + 1];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string fault = argv[1];
  emulated::order = {static_cast<unsigned>(std::atoi(argv[2])), std::atoi(argv[3]) != 0};
  auto* in = static_cast<float*>(std::aligned_alloc(16, 64 * sizeof(float)));
  auto* out = static_cast<float*>(std::aligned_alloc(16, 64 * sizeof(float)));
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  const auto run = [&](auto kernel, auto... arguments) {
    fedspine::launch("faults", kernel, 1, 64, nullptr, arguments...);
  };
  if (fault == "race" || fault == "exchange") run(exchange, out, fault == "exchange");
  if (fault == "unwaited" || fault == "copy") run(copy, in, out, fault == "copy");
  if (fault == "divergent_barrier") run(divergent_barrier, out);
  if (fault == "divergent_warp") run(divergent_warp, out);
  if (fault == "misaligned") run(misaligned, in, out);
  if (fault == "outside_shared") run(outside_shared, out);
  if (fault == "outside_global") run(outside_global, in, out);
  for (int i = 0; i < 64; ++i) std::printf("%g ", out[i]);
  std::free(in);
  std::free(out);
  return 0;
}
