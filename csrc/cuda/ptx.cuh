// The few instructions that CUDA C++ has no name for: asynchronous copies, matrix loads and tensor-core products, for
// sm_80 and newer. tests/kernels/cuda_on_cpu defines the same functions lane by lane for a CPU.
//
// Fragments, with g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   A (16, 16) four registers: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with its right neighbour
//   B (16, 8)  two registers:  (2t, g), (2t + 8, g), each with the element below
//   C (16, 8)  four floats:    (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fedspine {
#ifdef __CUDACC__
namespace {
#define FEDSPINE_PTX __device__ __forceinline__
#else
#define FEDSPINE_PTX
#endif

// Copies `bytes` (0 to 16) from global to shared memory and fills up to 16 with zeros. Both addresses are multiples of
// 16; nothing is read beyond `bytes`. Arrives with the group that the next commit closes.
FEDSPINE_PTX void cp_async_16(void* shared, const void* global, int bytes);
FEDSPINE_PTX void cp_async_commit();
// Waits for this thread's copies of all groups but the last committed; for those of other threads a barrier must
// follow.
FEDSPINE_PTX void cp_async_wait_all_but_one();

// Four 8 x 8 matrices of 16-bit elements: lane l names row l % 8 of matrix l / 8 (16 bytes, aligned to 16). Register i
// is elements (g, 2t) and (g, 2t + 1) of matrix i, or of its transpose.
FEDSPINE_PTX void ldmatrix(uint32_t (&fragment)[4], const void* row);
FEDSPINE_PTX void ldmatrix_transposed(uint32_t (&fragment)[4], const void* row);

// sum (16, 8) += A (16, 16) B (16, 8) in fp32; the last argument only names the format of A and B.
FEDSPINE_PTX void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half);
FEDSPINE_PTX void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16);

#ifdef __CUDACC__
FEDSPINE_PTX void cp_async_16(void* shared, const void* global, int bytes) {
  // .cg: through L2 only; every byte is read once per block.
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global)), "r"(bytes)
      : "memory");
}

FEDSPINE_PTX void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

FEDSPINE_PTX void cp_async_wait_all_but_one() {
  asm volatile("cp.async.wait_group 1;" ::: "memory");
}

FEDSPINE_PTX void ldmatrix(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

FEDSPINE_PTX void ldmatrix_transposed(uint32_t (&fragment)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

FEDSPINE_PTX void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FEDSPINE_PTX void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
}  // namespace
#endif
#undef FEDSPINE_PTX

}  // namespace fedspine
