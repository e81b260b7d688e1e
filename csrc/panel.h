// Panels: the right-hand operand of every product, rearranged so that the product reads it in
// order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matrix.h"
#include "vec.h"

namespace lora_kernels {

// Columns of a panel. Its width is the number that it has, rounded up to kPanelUnit.
constexpr int kPanel = 64;
constexpr int kPanelUnit = 16;

// Columns that a product takes at once: they lie together, so that it reads a panel in order.
constexpr int kStrip = kRegisters.columns * kLanes;
static_assert(kStrip == kPanel || kPanelUnit % kStrip == 0);

inline int64_t panels(int64_t cols) { return ceil_div(cols, kPanel); }

inline int64_t panel_width(int64_t cols) {
  return std::min<int64_t>(kPanel, ceil_div(cols, kPanelUnit) * kPanelUnit);
}

// Where element (k, n) of a panel of `depth` rows, padded, and `width` columns lies: strips one
// after the other, in each for every kStep of k those values of its columns.
template <typename C>
constexpr int64_t place(int64_t k, int64_t n, int64_t depth, int64_t width) {
  // The last may be narrower only where it is the one that there is.
  const int64_t first = kStrip == kPanel ? 0 : n / kStrip * kStrip;
  const int64_t strip = kStrip == kPanel ? width : kStrip;
  return first * depth + (k / kStep<C> * strip + n - first) * kStep<C> + k % kStep<C>;
}

// Elements of all panels of a matrix [K, N] together; panel p begins at p * kPanel * padded<C>(K).
// Each is made of panels of kPart<C> rows: those from row k on begin k * width later.
template <typename C>
int64_t packed_size(int64_t K, int64_t N) {
  return padded<C>(K) * ceil_div(N, kPanelUnit) * kPanelUnit;
}

// Rows [k0, k1) of columns [n0, n0 + kPanel) of b [K, N], rounded to C, as a panel; what is outside
// of b is zero. k1 - k0 is even for bfloat16, or k1 is K.
template <typename C>
void pack_panel(const ConstMatrix& b, int64_t k0, int64_t k1, int64_t n0, C* panel);

// kPanelUnit columns from column n on of a panel of K rows and `width` columns: N of them from
// b [N, ld], and zeros.
template <typename C>
void pack_unit(const C* b, int64_t ld, int64_t K, int64_t N, int64_t n, int64_t width, C* panel);

// Rows [i0, i1), columns [k0, k1) of x, rounded to C, as out[i - i0][ld], zero from k1 - k0 on.
template <typename C>
void copy_rows(const ConstMatrix& x, int64_t i0, int64_t i1, int64_t k0, int64_t k1, C* out,
               int64_t ld);

}  // namespace lora_kernels
