// Runs every CPU kernel with odd shapes and buffers of exactly the required size, for a build with sanitizers
// (test_kernels_sanitizers.py). It compares all results with plain loops in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "sanitized.h"

using namespace fedspine;

namespace {

void importance(int64_t rows, int64_t cols, int64_t rank, DType dtype, bool transposed, bool by_row, int threads) {
  const Owned w = make(rows, cols, dtype, transposed), a = make(rank, cols, dtype, transposed);
  const Owned b = make(rows, rank, dtype, !transposed), ga = make(rank, cols, dtype, false);
  const Owned gb = make(rows, rank, dtype, false);
  const int64_t length = by_row ? rows : cols, groups = (length + 2) / 3 + 1;
  std::unique_ptr<int32_t[]> group(new int32_t[length]);
  for (int64_t i = 0; i < length; ++i) group[i] = static_cast<int32_t>((i * 7) % groups);
  std::unique_ptr<float[]> scores(new float[groups]);
  importance_accumulate_cpu(
      {w.view, a.view, b.view, ga.view, gb.view, 0.5f, group.get(), by_row, groups, Metric::abs, scores.get()},
      threads);
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
  }
}

void project(int64_t rows, int64_t cols, int64_t rank, DType dtype, bool transposed, int threads) {
  const Owned x = make(rows, cols, dtype, transposed), s = make(cols, rank, dtype, !transposed);
  Owned out = make(rows, rank, DType::f32, transposed);
  lora_linear_project_cpu(out.view, x.view, s.view, 0.5f, threads);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rank; ++j) {
      double sum = 0.0;
      for (int64_t k = 0; k < cols; ++k) sum += x.values[i * cols + k] * s.values[k * rank + j];
      const float got = *(reinterpret_cast<float*>(out.data.get()) + i * out.view.row_stride + j * out.view.col_stride);
      expect(std::fabs(got - 0.5 * sum) <= 1e-3 + 1e-4 * std::fabs(sum), "project", rows, cols, rank);
    }
  }
}

void gather(int64_t rows, int64_t cols, bool by_row, bool transposed, int threads) {
  Owned in = make(rows, cols, DType::f32, transposed);
  const int64_t limit = by_row ? rows : cols, count = (limit + 1) / 2;
  std::unique_ptr<int64_t[]> index(new int64_t[count]);
  for (int64_t i = 0; i < count; ++i) index[i] = limit - 1 - 2 * i;
  const int64_t out_rows = by_row ? count : rows, out_cols = by_row ? cols : count;
  Owned out = make(out_rows, out_cols, DType::f32, false);
  gather_cpu(out.view, in.view, index.get(), by_row, 4, threads);
  for (int64_t i = 0; i < out_rows; ++i) {
    for (int64_t j = 0; j < out_cols; ++j) {
      const double expected = in.values[(by_row ? index[i] : i) * cols + (by_row ? j : index[j])];
      const float got = reinterpret_cast<float*>(out.data.get())[i * out_cols + j];
      expect(got == static_cast<float>(expected), "gather", rows, cols, 0);
    }
  }
  index[0] = limit;
  bool refused = false;
  try {
    gather_cpu(out.view, in.view, index.get(), by_row, 4, threads);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, "the validation of indices in gather", rows, cols, 0);
}

float at(const Owned& m, int64_t row, int64_t col) {
  return reinterpret_cast<const float*>(m.data.get())[row * m.view.row_stride + col];
}

bool close(double got, double expected) {
  return std::fabs(got - expected) <= 1e-6 + 1e-5 * std::fabs(expected);
}

void rms_norm(int64_t rows, int64_t cols, int threads) {
  const Owned x = make(rows, cols, DType::f32, false), w = make(1, cols, DType::f32, false);
  const Owned g = make(rows, cols, DType::f32, false);
  Owned y = make(rows, cols, DType::f32, false), dx = make(rows, cols, DType::f32, false);
  std::unique_ptr<float[]> rstd(new float[rows]);
  rms_norm_cpu(y.view, rstd.get(), x.view, w.view, 0.01f, threads);
  rms_norm_backward_cpu(dx.view, g.view, x.view, w.view, rstd.get(), threads);
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0.0, products = 0.0;
    for (int64_t j = 0; j < cols; ++j) {
      const double v = x.values[i * cols + j];
      squares += v * v;
      products += w.values[j] * g.values[i * cols + j] * v;
    }
    const double r = 1.0 / std::sqrt(squares / cols + 0.01);
    expect(close(rstd[i], r), "rstd of rms_norm", rows, cols, 0);
    for (int64_t j = 0; j < cols; ++j) {
      const double v = x.values[i * cols + j];
      expect(close(at(y, i, j), w.values[j] * v * r), "rms_norm", rows, cols, 0);
      const double slope = r * (w.values[j] * g.values[i * cols + j] - v * r * r * products / cols);
      expect(close(at(dx, i, j), slope), "rms_norm_backward", rows, cols, 0);
    }
  }
}

void swiglu(int64_t rows, int64_t cols, int threads) {
  const Owned gate = make(rows, cols, DType::f32, false), up = make(rows, cols, DType::f32, false);
  const Owned g = make(rows, cols, DType::f32, false);
  Owned y = make(rows, cols, DType::f32, false), dgate = make(rows, cols, DType::f32, false);
  Owned dup = make(rows, cols, DType::f32, false);
  swiglu_cpu(y.view, gate.view, up.view, threads);
  swiglu_backward_cpu(dgate.view, dup.view, g.view, gate.view, up.view, threads);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      const double a = gate.values[i * cols + j], b = up.values[i * cols + j], dy = g.values[i * cols + j];
      const double s = 1.0 / (1.0 + std::exp(-a));
      expect(close(at(y, i, j), a * s * b), "swiglu", rows, cols, 0);
      expect(close(at(dup, i, j), dy * a * s), "up of swiglu_backward", rows, cols, 0);
      expect(close(at(dgate, i, j), dy * b * s * (1.0 + a * (1.0 - s))), "gate of swiglu_backward", rows, cols, 0);
    }
  }
}

}  // namespace

int main() {
  const int64_t sizes[][3] = {{1, 1, 1},    {1, 300, 2},  {300, 1, 3},   {5, 33, 1},
                              {31, 97, 17}, {97, 65, 13}, {193, 131, 8}, {40, 37, 256}};
  const DType dtypes[] = {DType::f32, DType::f16, DType::bf16};
  for (const auto& size : sizes) {
    for (const DType dtype : dtypes) {
      for (const bool transposed : {false, true}) {
        for (const bool by_row : {false, true}) {
          importance(size[0], size[1], size[2], dtype, transposed, by_row, by_row ? 1 : 3);
        }
        project(size[0], size[1], size[2], dtype, transposed, transposed ? 2 : 1);
      }
    }
    rms_norm(size[0], size[1], 2);
    swiglu(size[0], size[1], 2);
    for (const bool by_row : {false, true}) gather(size[0], size[1], by_row, by_row, 2);
  }
  importance(640, 768, 16, DType::f32, false, true, 3);  // enough work for threads
  project(1200, 700, 12, DType::f32, false, 3);
  rms_norm(2000, 1001, 3);
  swiglu(700, 801, 3);
  std::printf("%s: %d failures\n", cpu_isa().c_str(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
