// Contiguous copies of selected rows or columns of a matrix. Elements are copied as raw bytes, whatever their dtype.
#include <cstring>
#include <stdexcept>

#include "../kernels.h"
#include "parallel.h"

namespace fedspine {
namespace {

template <typename T>
void gather_range(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; ++i) {
    T* to = static_cast<T*>(out.data) + i * out.row_stride;
    const T* from = static_cast<const T*>(in.data) + (by_row ? index[i] : i) * in.row_stride;
    if (by_row && in.col_stride == 1) {
      std::memcpy(to, from, static_cast<size_t>(out.cols) * sizeof(T));
    } else if (by_row) {
      for (int64_t j = 0; j < out.cols; ++j) to[j] = from[j * in.col_stride];
    } else {
      for (int64_t j = 0; j < out.cols; ++j) to[j] = from[index[j] * in.col_stride];
    }
  }
}

}  // namespace

void gather_cpu(const Matrix& out, const Matrix& in, const int64_t* index, bool by_row, int item_bytes, int threads) {
  const int64_t count = by_row ? out.rows : out.cols, limit = by_row ? in.rows : in.cols;
  for (int64_t i = 0; i < count; ++i) {
    if (index[i] < 0 || index[i] >= limit) {
      throw std::invalid_argument(std::string(by_row ? "gather_rows" : "gather_cols") + ": index[" + std::to_string(i) +
                                  "] is " + std::to_string(index[i]) + ", outside 0.." + std::to_string(limit - 1));
    }
  }
  const auto copy = item_bytes == 1   ? gather_range<uint8_t>
                    : item_bytes == 2 ? gather_range<uint16_t>
                    : item_bytes == 4 ? gather_range<uint32_t>
                                      : gather_range<uint64_t>;
  parallel_for(out.rows, threads, static_cast<double>(out.rows) * static_cast<double>(out.cols),
               [&](int64_t first, int64_t last) { copy(out, in, index, by_row, first, last); });
}

}  // namespace fedspine
