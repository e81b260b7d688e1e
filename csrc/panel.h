// Panels: the right-hand operand of every product, rearranged so that the product reads it in
// order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matrix.h"

namespace lora_kernels {

// Columns of a panel. Its width is the number that it has, rounded up to kPanelUnit.
constexpr int kPanel = 64;
constexpr int kPanelUnit = 16;

inline int64_t panels(int64_t cols) { return ceil_div(cols, kPanel); }

inline int64_t panel_width(int64_t cols) {
  return std::min<int64_t>(kPanel, ceil_div(cols, kPanelUnit) * kPanelUnit);
}

// Elements of all panels of a matrix [K, N] together; panel p begins at p * kPanel * padded<C>(K).
template <typename C>
int64_t packed_size(int64_t K, int64_t N) {
  return padded<C>(K) * ceil_div(N, kPanelUnit) * kPanelUnit;
}

// Rows [k0, k1) of columns [n0, n0 + kPanel) of b [K, N], rounded to C, as
// panel[(k - k0) / kStep][width][kStep]; what is outside of b is zero. k1 - k0 is even for
// bfloat16, or k1 is K.
template <typename C>
void pack_panel(const ConstMatrix& b, int64_t k0, int64_t k1, int64_t n0, C* panel);

// Asks for what pack_panel would read of all rows of b.
void prefetch_panel(const ConstMatrix& b, int64_t n0);

// Rows [i0, i1), columns [k0, k1) of x, rounded to C, as out[i - i0][ld], zero from k1 - k0 on.
template <typename C>
void copy_rows(const ConstMatrix& x, int64_t i0, int64_t i1, int64_t k0, int64_t k1, C* out,
               int64_t ld);

}  // namespace lora_kernels
