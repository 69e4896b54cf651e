// Group sums of LoRA-guided importance on CUDA. Reference implementations: importance_accumulate_reference in
// csrc/cpu/importance_accumulate.cpp and importance_accumulate in fedspine_edge/kernels/reference.py.
//
// Versions:
//   naive/importance_accumulate.cu   one thread per group, in double
//   importance_accumulate_fma.cuh    adds tiles of 64 x 64 with the factors in shared memory, 4 x 4 elements per
//   thread,
//                                    and partial sums of rows (or columns) that a second launch adds per group
//   importance_accumulate_mma.cuh    adds tensor cores and double-buffered asynchronous copies, for one 16-bit format
//
// There are two launches (up to six if factors have to be packed), and nothing is copied back to the host. Eager torch
// reads and writes about 21 matrices of the size of W and allocates three.
#include "importance_accumulate_fma.cuh"
#include "importance_accumulate_mma.cuh"

namespace fedspine {
namespace {

constexpr const char* kOp = "importance_accumulate";

// The workspace holds the flags of check_groups, the partial sums and the packed factors. Each part begins at a
// multiple of 16 bytes.
int64_t round_up(int64_t floats) {
  return ceil_div(floats, 4) * 4;
}
int64_t num_flags(int64_t length) {
  return round_up(ceil_div(length, kTile));
}
int64_t num_partials(int64_t rows, int64_t cols, bool by_row) {
  return num_slices(rows, cols, by_row) * (by_row ? rows : cols);
}

template <typename T>
void sum_fma(const ImportanceArgs& args, dim3 grid, int64_t tiles, int* flags, float* partial, cudaStream_t stream) {
  launch(kOp, args.by_row ? importance_sums_fma<T, true> : importance_sums_fma<T, false>, grid, kImportanceFmaThreads,
         stream, args.weight, args.lora_a, args.lora_b, args.grad_a, args.grad_b, args.scaling, args.metric, args.group,
         args.num_groups, tiles, flags, partial);
}

// Return the size in floats of a packed copy of a (rows, cols) factor with 16-bit elements.
int64_t packed_floats(int64_t rows, int64_t cols) {
  return rows * (ceil_div(cols, 8) * 4);
}

// Return the factor itself if it is aligned; otherwise pack a copy into `space` and advance `space`.
AlignedRows packed(const Matrix& m, float** space, cudaStream_t stream) {
  if (is_aligned(m)) return aligned_rows(m);
  const int64_t stride = ceil_div(m.cols, 8) * 8;
  const AlignedRows copy = {reinterpret_cast<uint16_t*>(*space), static_cast<int>(m.rows), static_cast<int>(m.cols),
                            static_cast<int>(stride)};
  launch(kOp, importance_pack, grid_size(kOp, ceil_div(m.rows * m.cols, kImportanceMmaThreads), kGridX),
         kImportanceMmaThreads, stream, m, reinterpret_cast<uint16_t*>(*space), copy.stride);
  *space += packed_floats(m.rows, m.cols);
  return copy;
}

template <typename T, typename Source>
void sum_mma_of(const ImportanceArgs& args, const Source& weight, dim3 grid, int64_t tiles, int* flags, float* partial,
                cudaStream_t stream) {
  float* space = partial + round_up(num_partials(args.weight.rows, args.weight.cols, args.by_row));
  const AlignedRows lora_a = packed(args.lora_a, &space, stream), lora_b = packed(args.lora_b, &space, stream);
  const AlignedRows grad_a = packed(args.grad_a, &space, stream), grad_b = packed(args.grad_b, &space, stream);
  launch(kOp, args.by_row ? importance_sums_mma<T, Source, true> : importance_sums_mma<T, Source, false>, grid,
         kImportanceMmaThreads, stream, weight, lora_a, lora_b, grad_a, grad_b, args.scaling, args.metric, args.group,
         args.num_groups, static_cast<int>(tiles), flags, partial);
}

template <typename T>
void sum_mma(const ImportanceArgs& args, dim3 grid, int64_t tiles, int* flags, float* partial, cudaStream_t stream) {
  if (is_aligned(args.weight)) {
    sum_mma_of<T>(args, aligned_rows(args.weight), grid, tiles, flags, partial, stream);
  } else {
    sum_mma_of<T>(args, args.weight, grid, tiles, flags, partial, stream);
  }
}

}  // namespace

int64_t importance_accumulate_workspace_floats(int64_t rows, int64_t cols, int64_t rank, bool by_row) {
  return num_flags(by_row ? rows : cols) + round_up(num_partials(rows, cols, by_row)) +
         2 * (packed_floats(rank, cols) + packed_floats(rows, rank));
}

void importance_accumulate_cuda(const ImportanceArgs& args, bool tensor_cores, float* workspace, int device,
                                uintptr_t stream_address) {
  const DeviceScope scope(kOp, device);
  const auto stream = reinterpret_cast<cudaStream_t>(stream_address);
  const int64_t rows = args.weight.rows, cols = args.weight.cols;
  if (rows == 0 || cols == 0) {
    check(kOp, "cudaMemsetAsync", cudaMemsetAsync(args.scores, 0, args.num_groups * sizeof(float), stream));
    return;
  }
  const int64_t length = args.by_row ? rows : cols, slices = num_slices(rows, cols, args.by_row);
  int* flags = reinterpret_cast<int*>(workspace);
  float* partial = workspace + num_flags(length);
  if (length >= kMaxSize || slices * length >= kMaxSize) {
    throw std::invalid_argument("importance_accumulate: the weight is too large, its partial sums exceed 2^31");
  }
  const dim3 grid(grid_size(kOp, ceil_div(length, kTile), kGridX), grid_size(kOp, slices, kGridY));
  const DType dtype = args.weight.dtype;
  if (tensor_cores) {
    if (rows >= kMaxSize || cols >= kMaxSize) {
      throw std::invalid_argument("importance_accumulate: the weight has 2^31 rows or columns or more");
    }
    for (const Matrix& factor : {args.lora_a, args.lora_b, args.grad_a, args.grad_b}) {
      if (dtype != DType::f32 && factor.dtype == dtype) continue;
      throw std::invalid_argument("importance_accumulate: tensor cores need one 16-bit dtype for all five matrices");
    }
  }
  const auto sum = tensor_cores          ? (dtype == DType::f16 ? sum_mma<__half> : sum_mma<__nv_bfloat16>)
                   : dtype == DType::f32 ? sum_fma<float>
                   : dtype == DType::f16 ? sum_fma<__half>
                                         : sum_fma<__nv_bfloat16>;
  sum(args, grid, tiles_per_block(rows, cols), flags, partial, stream);
  launch(kOp, importance_sum_groups, grid_size(kOp, ceil_div(args.num_groups, kGroupThreads / 32), kGridX),
         kGroupThreads, stream, partial, static_cast<int>(slices), args.group, static_cast<int>(length),
         args.num_groups, flags, args.scores);
}

int cuda_runtime_version() {
  int version = 0;
  check("build_info", "cudaRuntimeGetVersion", cudaRuntimeGetVersion(&version));
  return version;
}

}  // namespace fedspine
