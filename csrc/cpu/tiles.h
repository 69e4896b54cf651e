// What one instruction set offers: register-blocked loops over packed fp32 panels.
//
// The same source, tiles.inc, is compiled once per instruction set (tiles_baseline.cpp, tiles_avx2.cpp,
// tiles_avx512.cpp) and chosen at run time, so one binary runs on every machine and -march=native is never needed.
#pragma once

#include "../kernels.h"

namespace fedspine {

// Importance over packed factors. Row factors, per tile of `tile_rows` rows and per k: gB, scaling B and (B - gB),
// tile_rows floats each. Column factors, per panel of `panel_cols` columns and per k: A and gA, panel_cols each.
// Padding is zero.
struct ImportancePanels {
  Matrix weight;
  const float* row_factors;
  const float* col_factors;
  int64_t rank;
  Metric metric;
  double* sums;  // per row or per column of W
};

// H = alpha X S: S packed transposed, (padded_rank, k) contiguous, zero beyond rank.
struct ProjectPanels {
  Matrix out, x;
  const float* small;
  int64_t rank;
  float alpha;
};

// fp32, the elements of a row next to one another. Forward: out from x; backward: out, the gradient of x, from grad
// and x.
struct RmsNormArgs {
  Matrix out, grad, x, weight;  // weight is one row
  float epsilon;
  float* rstd;  // per row, written by the forward pass
};

// Likewise. Forward: out from gate and up; backward: out, the gradient of gate, and grad_up.
struct SwigluArgs {
  Matrix out, grad_up, grad, gate, up;
};

struct Tiles {
  const char* name;
  int importance_rows;  // rows of W per register tile
  int panel_cols;       // columns of W per register tile
  int project_rows;     // rows of X per register tile
  int project_ranks;    // ranks per register tile
  void (*importance_rows_sum)(const ImportancePanels&, int64_t first_tile, int64_t last_tile);
  void (*importance_cols_sum)(const ImportancePanels&, int64_t first_panel, int64_t last_panel);
  void (*project)(const ProjectPanels&, int64_t first_tile, int64_t last_tile);
  void (*rms_norm)(const RmsNormArgs&, int64_t first_row, int64_t last_row);
  void (*rms_norm_backward)(const RmsNormArgs&, int64_t first_row, int64_t last_row);
  void (*swiglu)(const SwigluArgs&, int64_t first_row, int64_t last_row);
  void (*swiglu_backward)(const SwigluArgs&, int64_t first_row, int64_t last_row);
};

extern const Tiles tiles_baseline;
#if defined(__x86_64__)
extern const Tiles tiles_avx2;
extern const Tiles tiles_avx512;
#endif

// The best of the above that this CPU runs; FEDSPINE_ISA=baseline|avx2 narrows the choice (for tests).
const Tiles& tiles();

}  // namespace fedspine
