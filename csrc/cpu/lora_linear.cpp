// The projection of lora_linear on the CPU: H = alpha X S, where S has few columns.
//
// It is the only product of lora_linear that is faster here than in torch's BLAS (docs/decisions/0010): a general GEMM
// with 8 columns spends as much time on packing X as on arithmetic. This kernel reads X in place and packs only S. The
// base GEMM, the rank-r updates and the gradients of the adapter stay with torch
// (fedspine_edge/kernels/lora_linear.py). The inner loop is in lora_linear.inc.
#include <vector>

#include "../kernels.h"
#include "isa_table.h"
#include "parallel.h"
#include "storage.h"

namespace fedspine {

void lora_linear_project_cpu(const Matrix& out, const Matrix& x, const Matrix& small, float alpha, int threads) {
  if (out.rows == 0 || out.cols == 0) return;
  const IsaTable& isa = isa_table();
  const int64_t rank = small.cols, width = small.rows;
  const int64_t padded = (rank + isa.project_tile_ranks - 1) / isa.project_tile_ranks * isa.project_tile_ranks;
  std::vector<float> packed(padded * width, 0.0f);
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t k = 0; k < width; ++k) packed[j * width + k] = load(small, k, j);
  }
  const ProjectPanels panels = {out, x, packed.data(), rank, alpha};
  const double work = static_cast<double>(x.rows) * static_cast<double>(width) * static_cast<double>(rank);
  parallel_for((out.rows + isa.project_tile_rows - 1) / isa.project_tile_rows, threads, work,
               [&](int64_t first, int64_t last) { isa.project(panels, first, last); });
}

}  // namespace fedspine
