// The function table of one instruction set: register-blocked loops over packed fp32 panels.
//
// The same source, isa_table.inc, is compiled once per instruction set (isa_baseline.cpp, isa_avx2.cpp,
// isa_avx512.cpp), and dispatch.cpp selects a table at run time. One binary therefore runs on every machine, and
// -march=native is never needed.
#pragma once

#include "../kernels.h"

namespace fedspine {

// Operands of importance_accumulate. row_factors holds, for each tile of importance_tile_rows rows and each rank k, gB,
// scaling B and B - gB with one float per row. col_factors holds, for each panel of importance_panel_cols columns and
// each rank k, A and gA with one float per column. Padding is zero.
struct ImportancePanels {
  Matrix weight;
  const float* row_factors;
  const float* col_factors;
  int64_t rank;
  Metric metric;
  double* sums;  // one per row or per column of W
};

// Operands of H = alpha X S. small is Sᵀ, contiguous with shape (padded rank, k) and zero beyond the rank.
struct ProjectPanels {
  Matrix out, x;
  const float* small;
  int64_t rank;
  float alpha;
};

// Operands of rms_norm, all fp32 with contiguous rows. The forward pass computes out and rstd from x. The backward pass
// computes the gradient of x into out, from grad and x.
struct RmsNormArgs {
  Matrix out, grad, x, weight;  // weight has one row
  float epsilon;
  float* rstd;  // one per row, written by the forward pass
};

// Operands of swiglu, all fp32 with contiguous rows. The forward pass computes out from gate and up. The backward pass
// computes the gradient of gate into out, and grad_up.
struct SwigluArgs {
  Matrix out, grad_up, grad, gate, up;
};

struct IsaTable {
  const char* name;
  int importance_tile_rows;   // rows of W per register tile
  int importance_panel_cols;  // columns of W per register tile
  int project_tile_rows;      // rows of X per register tile
  int project_tile_ranks;     // ranks per register tile
  void (*importance_rows_sum)(const ImportancePanels&, int64_t first_tile, int64_t last_tile);
  void (*importance_cols_sum)(const ImportancePanels&, int64_t first_panel, int64_t last_panel);
  void (*project)(const ProjectPanels&, int64_t first_tile, int64_t last_tile);
  void (*rms_norm)(const RmsNormArgs&, int64_t first_row, int64_t last_row);
  void (*rms_norm_backward)(const RmsNormArgs&, int64_t first_row, int64_t last_row);
  void (*swiglu)(const SwigluArgs&, int64_t first_row, int64_t last_row);
  void (*swiglu_backward)(const SwigluArgs&, int64_t first_row, int64_t last_row);
};

extern const IsaTable isa_baseline;
#if defined(__x86_64__)
extern const IsaTable isa_avx2;
extern const IsaTable isa_avx512;
#endif

// Return the best table that this CPU supports. FEDSPINE_ISA=baseline or avx2 limits the choice, for tests.
const IsaTable& isa_table();

}  // namespace fedspine
