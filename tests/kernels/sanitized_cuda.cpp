// Runs every emulated CUDA kernel, the naive ones included, with odd shapes and buffers of exactly the required size,
// for builds with sanitizers (test_kernels_emulation.py). Arguments: the order of threads and whether cp.async is late.
#include <cmath>
#include <cstdlib>

#include "cuda_runtime.h"
#include "sanitized.h"

using namespace fedspine;

namespace {

// Return memory that is aligned to 16 bytes, as cudaMalloc does.
std::unique_ptr<float, decltype(&std::free)> workspace(int64_t floats) {
  const size_t bytes = static_cast<size_t>(floats + 3) / 4 * 16;
  return {static_cast<float*>(std::aligned_alloc(16, bytes == 0 ? 16 : bytes)), &std::free};
}

bool near(double got, double exact, double slack) {
  return std::fabs(got - exact) <= slack + 1e-2 * std::fabs(exact);
}

float value(const Matrix& m, int64_t i, int64_t j) {
  const int64_t at = i * m.row_stride + j * m.col_stride;
  if (m.dtype == DType::f32) return static_cast<const float*>(m.data)[at];
  const uint16_t half = static_cast<const uint16_t*>(m.data)[at];
  uint32_t bits = static_cast<uint32_t>(half) << 16;
  if (m.dtype == DType::f16)
    bits = (half & 0x8000u) << 16 | ((half & 0x7fffu) == 0 ? 0 : ((half & 0x7fffu) << 13) + 0x38000000u);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

void importance(int64_t rows, int64_t cols, int64_t rank, DType dtype, bool transposed, bool by_row,
                bool tensor_cores) {
  const Owned w = make(rows, cols, dtype, transposed), a = make(rank, cols, dtype, false);
  const Owned b = make(rows, rank, dtype, transposed), ga = make(rank, cols, dtype, transposed);
  const Owned gb = make(rows, rank, dtype, false);
  const int64_t length = by_row ? rows : cols, groups = (length + 2) / 3 + 1;
  std::unique_ptr<int32_t[]> group(new int32_t[length]);
  for (int64_t i = 0; i < length; ++i)
    group[i] = static_cast<int32_t>(transposed ? (i * 7) % groups : i * groups / length);
  std::unique_ptr<float[]> scores(new float[groups]), naive(new float[groups]);
  importance_accumulate_naive_cuda(
      {w.view, a.view, b.view, ga.view, gb.view, 0.5f, group.get(), by_row, groups, Metric::abs, naive.get()}, 0, 0);
  const auto space = workspace(importance_accumulate_workspace_floats(rows, cols, rank, by_row));
  importance_accumulate_cuda(
      {w.view, a.view, b.view, ga.view, gb.view, 0.5f, group.get(), by_row, groups, Metric::abs, scores.get()},
      tensor_cores, space.get(), 0, 0);
  std::vector<double> sums(groups, 0.0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      double ghat = 0.0, delta = 0.0;
      for (int64_t k = 0; k < rank; ++k) {
        const double bk = b.values[i * rank + k], gbk = gb.values[i * rank + k];
        const double ak = a.values[k * cols + j], gak = ga.values[k * cols + j];
        ghat += gbk * ak + bk * gak - gbk * gak;
        delta += bk * ak;
      }
      sums[group[by_row ? i : j]] += std::fabs(ghat * (w.values[i * cols + j] + 0.5 * delta));
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    expect(std::fabs(scores[g] - sums[g]) <= 1e-3 + 1e-4 * sums[g], "importance", rows, cols, rank);
    expect(std::fabs(naive[g] - sums[g]) <= 1e-6 + 1e-6 * sums[g], "naive importance", rows, cols, rank);
  }
}

// The three products of one lora_linear with an input of tokens x cols.
void products(int64_t tokens, int64_t cols, int64_t rank, DType dtype, bool transposed, bool tensor_cores) {
  const Owned x = make(tokens, cols, dtype, transposed), small = make(cols, rank, dtype, !transposed);
  const Owned left = make(tokens, rank, dtype, false), right = make(rank, cols, dtype, transposed);
  Owned h = make(tokens, rank, dtype, false), y = make(tokens, cols, dtype, transposed);
  Owned g = make(rank, cols, dtype, false), naive = make(tokens, rank, dtype, false);
  lora_linear_product_naive_cuda(naive.view, x.view, small.view, 0.5f, false, 0, 0);
  const auto for_h = workspace(lora_linear_workspace_floats(tokens, rank, cols));
  const auto for_g = workspace(lora_linear_workspace_floats(rank, cols, tokens));
  lora_linear_project_cuda(h.view, x.view, small.view, 0.5f, tensor_cores, for_h.get(), 0, 0);
  lora_linear_expand_cuda(y.view, left.view, right.view, 0.5f, tensor_cores, 0, 0);
  lora_linear_gradient_cuda(g.view, left.view, x.view, 0.5f, tensor_cores, for_g.get(), 0, 0);
  const double slack = 1e-2 * std::sqrt(static_cast<double>(tokens + cols + rank));
  for (int64_t i = 0; i < tokens; ++i) {
    for (int64_t k = 0; k < rank; ++k) {
      double sum = 0.0;
      for (int64_t j = 0; j < cols; ++j) sum += x.values[i * cols + j] * small.values[j * rank + k];
      expect(near(value(h.view, i, k), 0.5 * sum, slack), "project", tokens, cols, rank);
      expect(near(value(naive.view, i, k), 0.5 * sum, slack), "naive project", tokens, cols, rank);
    }
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0.0;
      for (int64_t k = 0; k < rank; ++k) sum += left.values[i * rank + k] * right.values[k * cols + j];
      expect(near(value(y.view, i, j), y.values[i * cols + j] + 0.5 * sum, slack), "expand", tokens, cols, rank);
    }
  }
  for (int64_t k = 0; k < rank; ++k) {
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0.0;
      for (int64_t i = 0; i < tokens; ++i) sum += left.values[i * rank + k] * x.values[i * cols + j];
      expect(near(value(g.view, k, j), 0.5 * sum, slack), "gradient", tokens, cols, rank);
    }
  }
}

void gather(int64_t rows, int64_t cols, bool by_row) {
  const Owned in = make(rows, cols, DType::f32, by_row);
  const int64_t limit = by_row ? rows : cols, count = (limit + 1) / 2;
  std::unique_ptr<int64_t[]> index(new int64_t[count]);
  for (int64_t i = 0; i < count; ++i) index[i] = limit - 1 - 2 * i;
  Owned out = make(by_row ? count : rows, by_row ? cols : count, DType::f32, false);
  Owned naive = make(out.view.rows, out.view.cols, DType::f32, false);
  gather_cuda(out.view, in.view, index.get(), by_row, 4, 0, 0);
  gather_naive_cuda(naive.view, in.view, index.get(), by_row, 4, 0, 0);
  for (int64_t i = 0; i < out.view.rows; ++i) {
    for (int64_t j = 0; j < out.view.cols; ++j) {
      const double exact = in.values[(by_row ? index[i] : i) * cols + (by_row ? j : index[j])];
      expect(value(out.view, i, j) == static_cast<float>(exact), "gather", rows, cols, 0);
      expect(value(naive.view, i, j) == static_cast<float>(exact), "naive gather", rows, cols, 0);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  emulated::order = {static_cast<unsigned>(std::atoi(argv[1])), std::atoi(argv[2]) != 0};
  const int64_t sizes[][3] = {{1, 1, 1}, {5, 72, 8}, {70, 3, 3}, {67, 136, 17}, {520, 24, 40}, {33, 9, 256}};
  for (const auto& size : sizes) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      for (const bool transposed : {false, true}) {
        for (const bool tensor_cores : {false, true}) {
          if (tensor_cores && dtype == DType::f32) continue;
          if (!tensor_cores && dtype == DType::f16) continue;  // as bf16
          for (const bool by_row : {false, true}) {
            importance(size[0], size[1], size[2], dtype, transposed, by_row, tensor_cores);
          }
          products(size[0], size[1], size[2], dtype, transposed, tensor_cores);
        }
      }
    }
    for (const bool by_row : {false, true}) gather(size[0], size[1], by_row);
  }
  importance(5, 64 * 129, 20, DType::bf16, false, true, true);  // several tiles per block
  importance(5, 64 * 129, 20, DType::f32, false, true, false);
  std::printf("emulated: %d failures\n", failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
