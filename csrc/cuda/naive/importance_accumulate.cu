// Naive importance_accumulate: one thread per group, in double. The tests compare the fast versions with it; see
// csrc/cuda/importance_accumulate.cu for the list of versions.
#include "../common.cuh"

namespace fedspine {
namespace {

__global__ void importance_accumulate_naive(ImportanceArgs args) {
  const int64_t id = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (id >= args.num_groups) return;
  double score = 0.0;
  for (int64_t row = 0; row < args.weight.rows; ++row) {
    for (int64_t col = 0; col < args.weight.cols; ++col) {
      if (args.group[args.by_row ? row : col] != id) continue;
      double ghat = 0.0, delta = 0.0;
      for (int64_t k = 0; k < args.lora_a.rows; ++k) {
        const double a = load(args.lora_a, k, col), grad_a = load(args.grad_a, k, col);
        const double b = load(args.lora_b, row, k), grad_b = load(args.grad_b, row, k);
        ghat += grad_b * a + b * grad_a - grad_b * grad_a;
        delta += b * a;
      }
      double importance = ghat * (load(args.weight, row, col) + args.scaling * delta);
      if (args.metric == Metric::abs) importance = fabs(importance);
      if (args.metric == Metric::square) importance *= importance;
      score += importance;
    }
  }
  args.scores[id] = static_cast<float>(score);
}

}  // namespace

void importance_accumulate_naive_cuda(const ImportanceArgs& args, int device, uintptr_t stream) {
  const char* op = "importance_accumulate";
  const DeviceScope scope(op, device);
  launch(op, importance_accumulate_naive, grid_size(op, ceil_div(args.num_groups, 64), kGridX), 64,
         reinterpret_cast<cudaStream_t>(stream), args);
}

}  // namespace fedspine
