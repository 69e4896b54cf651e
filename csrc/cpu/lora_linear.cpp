// The one product of lora_linear that beats torch's BLAS on a CPU: H = alpha X S with a handful of columns.
//
// The base GEMM, the rank-r updates and the adapter gradients stay with torch (see lowrank.py, and docs/kernels.md for
// the measurements). A general GEMM with 8 columns spends as long on packing X as on arithmetic; here X is read in
// place and only the small factor is packed.
#include <vector>

#include "../kernels.h"
#include "parallel.h"
#include "storage.h"
#include "tiles.h"

namespace fedspine {

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
  const double work = static_cast<double>(x.rows) * static_cast<double>(width) * static_cast<double>(rank);
  parallel_for((out.rows + isa.project_rows - 1) / isa.project_rows, threads, work,
               [&](int64_t first, int64_t last) { isa.project(panels, first, last); });
}

}  // namespace fedspine
