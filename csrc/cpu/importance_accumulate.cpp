// Group sums of LoRA-guided importance on the CPU: reference implementation, packing, threads and the two-stage
// reduction. The inner loops are in importance_accumulate.inc.
#include <cmath>
#include <stdexcept>
#include <vector>

#include "../kernels.h"
#include "isa_table.h"
#include "parallel.h"
#include "storage.h"

namespace fedspine {
namespace {

// Reference implementation: every element in double. It also computes weights that are too small to be packed.
void importance_accumulate_reference(const ImportanceArgs& args) {
  std::vector<double> sums(args.num_groups, 0.0);
  for (int64_t i = 0; i < args.weight.rows; ++i) {
    for (int64_t j = 0; j < args.weight.cols; ++j) {
      double ghat = 0.0, delta = 0.0;
      for (int64_t k = 0; k < args.lora_a.rows; ++k) {
        const double a = load(args.lora_a, k, j), ga = load(args.grad_a, k, j);
        const double b = load(args.lora_b, i, k), gb = load(args.grad_b, i, k);
        ghat += gb * a + (b - gb) * ga;
        delta += b * a;
      }
      double x = ghat * (load(args.weight, i, j) + args.scaling * delta);
      if (args.metric == Metric::abs) x = std::fabs(x);
      if (args.metric == Metric::square) x *= x;
      sums[args.group[args.by_row ? i : j]] += x;
    }
  }
  for (int64_t g = 0; g < args.num_groups; ++g) args.scores[g] = static_cast<float>(sums[g]);
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Return gB, scaling B and B - gB, interleaved by tile so that the inner loop reads one stream. O(out r) memory.
std::vector<float> pack_rows(const ImportanceArgs& args, int64_t tile) {
  const int64_t rows = args.weight.rows, rank = args.lora_a.rows;
  std::vector<float> packed(round_up(rows, tile) * rank * 3, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    float* out = packed.data() + (i / tile) * tile * rank * 3 + i % tile;
    for (int64_t k = 0; k < rank; ++k, out += 3 * tile) {
      const float b = load(args.lora_b, i, k), gb = load(args.grad_b, i, k);
      out[0] = gb;
      out[tile] = args.scaling * b;
      out[2 * tile] = b - gb;
    }
  }
  return packed;
}

// Return A and gA, interleaved by panel. O(in r) memory.
std::vector<float> pack_cols(const ImportanceArgs& args, int64_t panel) {
  const int64_t cols = args.weight.cols, rank = args.lora_a.rows;
  std::vector<float> packed(round_up(cols, panel) * rank * 2, 0.0f);
  for (int64_t first = 0; first < cols; first += panel) {
    const int64_t count = std::min(panel, cols - first);
    float* out = packed.data() + first * rank * 2;
    for (int64_t k = 0; k < rank; ++k, out += 2 * panel) {
      for (int64_t j = 0; j < count; ++j) out[j] = load(args.lora_a, k, first + j);
      for (int64_t j = 0; j < count; ++j) out[panel + j] = load(args.grad_a, k, first + j);
    }
  }
  return packed;
}

}  // namespace

void importance_accumulate_cpu(const ImportanceArgs& args, int threads) {
  const int64_t rows = args.weight.rows, cols = args.weight.cols, rank = args.lora_a.rows;
  const int64_t length = args.by_row ? rows : cols;
  for (int64_t i = 0; i < length; ++i) {
    if (args.group[i] < 0 || args.group[i] >= args.num_groups) {
      throw std::invalid_argument(
          "importance_accumulate: " + std::string(args.by_row ? "group_of_row" : "group_of_col") + "[" +
          std::to_string(i) + "] is " + std::to_string(args.group[i]) + ", outside 0.." +
          std::to_string(args.num_groups - 1));
    }
  }
  // Packing costs O((out + in) r) and pays off from a few tiles on.
  if (rows * cols < 256) return importance_accumulate_reference(args);

  const IsaTable& isa = isa_table();
  const std::vector<float> row_factors = pack_rows(args, isa.importance_tile_rows);
  const std::vector<float> col_factors = pack_cols(args, isa.importance_panel_cols);
  // Stage one computes one sum per row (or column) of W. One thread sums a row in a fixed order, so the bits do not
  // depend on the number of threads.
  std::vector<double> sums(length, 0.0);
  const ImportancePanels panels = {args.weight, row_factors.data(), col_factors.data(), rank, args.metric, sums.data()};
  const double work = 3.0 * static_cast<double>(rows) * static_cast<double>(cols) * static_cast<double>(rank);
  const int64_t step = args.by_row ? isa.importance_tile_rows : isa.importance_panel_cols;
  const auto stage_one = args.by_row ? isa.importance_rows_sum : isa.importance_cols_sum;
  parallel_for((length + step - 1) / step, threads, work,
               [&](int64_t first, int64_t last) { stage_one(panels, first, last); });
  // Stage two adds the sums of rows (or columns) to their groups, in index order.
  std::vector<double> groups(args.num_groups, 0.0);
  for (int64_t i = 0; i < length; ++i) groups[args.group[i]] += sums[i];
  for (int64_t g = 0; g < args.num_groups; ++g) args.scores[g] = static_cast<float>(groups[g]);
}

}  // namespace fedspine
