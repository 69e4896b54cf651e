// PTX instructions without a CUDA C++ equivalent: asynchronous copies, matrix loads and tensor-core products, for sm_80
// and newer. tests/kernels/cuda_on_cpu/ptx.cpp defines the same functions for a CPU, lane by lane.
//
// A warp has eight quads of four lanes. The fragments below are those of the PTX ISA, "Matrix Fragments for
// mma.m16n8k16", where quad = lane / 4 is called groupID and lane_in_quad = lane % 4 threadID_in_group. With q = quad
// and i = lane_in_quad:
//   A (16, 16) four registers: (q, 2i), (q + 8, 2i), (q, 2i + 8), (q + 8, 2i + 8), each with its right neighbour
//   B (16, 8)  two registers:  (2i, q), (2i + 8, q), each with the element below
//   C (16, 8)  four floats:    (q, 2i), (q, 2i + 1), (q + 8, 2i), (q + 8, 2i + 1)
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

// Start copying `bytes` (0 to 16) from global to shared memory and fill the rest of the 16 bytes with zeros. Both
// addresses must be multiples of 16; nothing beyond `bytes` is read. The copy belongs to the group of the next commit.
FEDSPINE_PTX void cp_async_16(void* shared, const void* global, int bytes);
FEDSPINE_PTX void cp_async_commit();
// Wait for this thread's copies of all groups except the last committed one. A barrier must follow before other
// threads' copies are read.
FEDSPINE_PTX void cp_async_wait_all_but_one();

// Load four 8 x 8 matrices of 16-bit elements. Each lane passes the address of one row of 16 bytes, aligned to 16: row
// lane % 8 of matrix lane / 8. Register n receives the elements (q, 2i) and (q, 2i + 1) of matrix n or of its
// transpose.
FEDSPINE_PTX void ldmatrix(uint32_t (&fragment)[4], const void* row);
FEDSPINE_PTX void ldmatrix_transposed(uint32_t (&fragment)[4], const void* row);

// Compute sum (16, 8) += A (16, 16) B (16, 8) in fp32. The last argument only selects the format of A and B.
FEDSPINE_PTX void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half);
FEDSPINE_PTX void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16);

#ifdef __CUDACC__
FEDSPINE_PTX void cp_async_16(void* shared, const void* global, int bytes) {
  // .cg caches in L2 only, because a block reads every byte once.
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
