// Group scores of LoRA-guided importance on CUDA. Reference: importance_accumulate_reference in
// csrc/cpu/importance_accumulate.cpp and fedspine_edge/kernels/reference.py.
//
// Two launches, nothing read back: stage one leaves partial sums per row (or column) and slice, stage two adds them per
// group. The eager form moves about 21 matrices of m x n and allocates three.
#include "importance_fma.cuh"
#include "importance_mma.cuh"

namespace fedspine {
namespace {

constexpr const char* kOp = "importance_accumulate";

// The workspace: flags of stage one's blocks, partial sums, packed factors, each from a multiple of 16 bytes on.
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
  launch(kOp, args.by_row ? importance_sums_fma<T, true> : importance_sums_fma<T, false>, grid, kFmaThreads, stream,
         args.weight, args.lora_a, args.lora_b, args.grad_a, args.grad_b, args.scaling, args.metric, args.group,
         args.num_groups, tiles, flags, partial);
}

// The floats that a packed copy of a (rows, cols) factor of 16-bit elements takes.
int64_t packed_floats(int64_t rows, int64_t cols) {
  return rows * (ceil_div(cols, 8) * 4);
}

// The factor as the kernel needs it: itself where it is aligned, else a copy in `space`, which moves on.
AlignedRows packed(const Matrix& m, float** space, cudaStream_t stream) {
  if (is_aligned(m)) return aligned_rows(m);
  const int64_t stride = ceil_div(m.cols, 8) * 8;
  const AlignedRows copy = {reinterpret_cast<uint16_t*>(*space), static_cast<int>(m.rows), static_cast<int>(m.cols),
                            static_cast<int>(stride)};
  launch(kOp, importance_pack, grid_size(kOp, ceil_div(m.rows * m.cols, kMmaThreads), kGridX), kMmaThreads, stream, m,
         reinterpret_cast<uint16_t*>(*space), copy.stride);
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
         kMmaThreads, stream, weight, lora_a, lora_b, grad_a, grad_b, args.scaling, args.metric, args.group,
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

int64_t importance_workspace_floats(int64_t rows, int64_t cols, int64_t rank, bool by_row) {
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
