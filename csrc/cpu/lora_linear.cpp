// The low-rank products of lora_linear on the CPU: packing and threads; the loops are in tiles.inc.
//
// The base GEMM stays with torch's BLAS. These products have one tiny dimension (r), for which a general GEMM spends
// as long on packing the large operand as on arithmetic; here only the small factor is packed.
#include <vector>

#include "../kernels.h"
#include "parallel.h"
#include "storage.h"
#include "tiles.h"

namespace fedspine {
namespace {

double multiply_adds(int64_t m, int64_t n, int64_t k) {
  return static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

// (rows, r) interleaved by tiles of `tile` rows: per tile and k, `tile` floats.
std::vector<float> pack_tiles(const Matrix& m, int64_t tile, float alpha) {
  std::vector<float> packed((m.rows + tile - 1) / tile * tile * m.cols, 0.0f);
  for (int64_t i = 0; i < m.rows; ++i) {
    float* out = packed.data() + (i / tile) * tile * m.cols + i % tile;
    for (int64_t k = 0; k < m.cols; ++k) out[k * tile] = alpha * load(m, i, k);
  }
  return packed;
}

Matrix transposed(const Matrix& m) {
  return {m.data, m.cols, m.rows, m.col_stride, m.row_stride, m.dtype};
}

}  // namespace

void lowrank_expand_cpu(const Matrix& out, const Matrix& left, const Matrix& right, float alpha, int threads) {
  if (out.rows == 0 || out.cols == 0) return;
  const Tiles& isa = tiles();
  const std::vector<float> rows = pack_tiles(left, isa.gemm_rows, alpha);
  const std::vector<float> cols = pack_tiles(transposed(right), isa.panel_cols, 1.0f);
  const ExpandPanels panels = {out, rows.data(), cols.data(), left.cols};
  parallel_for((out.rows + isa.gemm_rows - 1) / isa.gemm_rows, threads, multiply_adds(out.rows, out.cols, left.cols),
               [&](int64_t first, int64_t last) { isa.expand(panels, first, last); });
}

void lowrank_project_cpu(const Matrix& out, const Matrix& x, const Matrix& small, float alpha, int threads) {
  if (out.rows == 0 || out.cols == 0) return;
  const Tiles& isa = tiles();
  const int64_t rank = small.cols, width = small.rows;
  const int64_t padded = (rank + isa.project_ranks - 1) / isa.project_ranks * isa.project_ranks;
  std::vector<float> packed(padded * width, 0.0f);
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t k = 0; k < width; ++k) packed[j * width + k] = load(small, k, j);
  }
  const ProjectPanels panels = {out, x, packed.data(), rank, alpha};
  parallel_for((out.rows + isa.project_rows - 1) / isa.project_rows, threads, multiply_adds(x.rows, width, rank),
               [&](int64_t first, int64_t last) { isa.project(panels, first, last); });
}

void lowrank_gradient_cpu(const Matrix& out, const Matrix& left, const Matrix& x, float alpha, int threads) {
  if (out.rows == 0 || out.cols == 0) return;
  const Tiles& isa = tiles();
  // Lᵀ by tiles of ranks; a thread owns columns of G, so the sum over tokens has one order.
  const std::vector<float> packed = pack_tiles(transposed(left), isa.gemm_rows, alpha);
  const GradientPanels panels = {out, x, packed.data(), left.cols};
  parallel_for((x.cols + isa.panel_cols - 1) / isa.panel_cols, threads, multiply_adds(x.rows, x.cols, left.cols),
               [&](int64_t first, int64_t last) { isa.gradient(panels, first, last); });
}

}  // namespace fedspine
