// Rows of float32 sums on their way out: rounded once, to what a matrix holds.
#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.h"
#include "vec.h"

namespace lora_kernels {

// Row i of out from column j on, where columns are neighbours.
inline void store_row(const float* from, int64_t n, const Matrix& out, int64_t i, int64_t j) {
  const int64_t index = i * out.stride_row + j;
  if (out.kind == Kind::kFloat) {
    std::memcpy(static_cast<float*>(out.data) + index, from, n * sizeof(float));
  } else if (out.kind == Kind::kBFloat16) {
    auto* to = static_cast<BFloat16*>(out.data) + index;
    int64_t k = 0;
    for (; k + kLanes <= n; k += kLanes) store_bfloat16(to + k, load<Vec>(from + k));
    for (; k < n; ++k) to[k] = BFloat16(from[k]);
  } else {
    auto* to = static_cast<Half*>(out.data) + index;
    for (int64_t k = 0; k < n; ++k) to[k] = Half(from[k]);
  }
}

// The same with what the matrix holds added before the one rounding.
inline void add_row(const float* from, int64_t n, const Matrix& out, int64_t i, int64_t j) {
  const int64_t index = i * out.stride_row + j;
  int64_t k = 0;
  if (out.kind == Kind::kFloat) {
    auto* to = static_cast<float*>(out.data) + index;
    for (; k < n; ++k) to[k] += from[k];
  } else if (out.kind == Kind::kBFloat16) {
    auto* to = static_cast<BFloat16*>(out.data) + index;
    for (; k + kLanes <= n; k += kLanes) {
      const Words bits = __builtin_convertvector(load<NarrowHalfWords>(to + k), Words);
      store_bfloat16(to + k, lower_bfloat16(bits) + load<Vec>(from + k));
    }
    for (; k < n; ++k) to[k] = BFloat16(static_cast<float>(to[k]) + from[k]);
  } else {
    auto* to = static_cast<Half*>(out.data) + index;
    for (; k < n; ++k) to[k] = Half(static_cast<float>(to[k]) + from[k]);
  }
}

// One or the other, also into columns that are no neighbours.
inline void store_or_add(const float* from, int64_t n, const Matrix& out, int64_t i, int64_t j,
                         bool add) {
  if (out.stride_col == 1) return add ? add_row(from, n, out, i, j) : store_row(from, n, out, i, j);
  with_type(out.kind, [&]<typename T>() {
    T* to = static_cast<T*>(out.data) + i * out.stride_row + j * out.stride_col;
    for (int64_t k = 0; k < n; ++k, to += out.stride_col) {
      *to = T(add ? static_cast<float>(*to) + from[k] : from[k]);
    }
  });
}

}  // namespace lora_kernels
