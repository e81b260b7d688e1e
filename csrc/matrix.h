// What the kernels take in place of tensors: where a matrix lies, of which type, with which
// strides.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace lora_kernels {

using c10::BFloat16;
using c10::Half;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Kind { kFloat, kBFloat16, kHalf };

// f<T>() for the type T that `kind` names.
template <typename F>
auto with_type(Kind kind, F f) {
  switch (kind) {
    case Kind::kFloat:
      return f.template operator()<float>();
    case Kind::kBFloat16:
      return f.template operator()<BFloat16>();
    default:
      return f.template operator()<Half>();
  }
}

template <typename T>
constexpr Kind kind_of = std::is_same_v<T, float>      ? Kind::kFloat
                         : std::is_same_v<T, BFloat16> ? Kind::kBFloat16
                                                       : Kind::kHalf;

// Element (i, j) is number i * stride_row + j * stride_col from data on.
template <typename Void>
struct MatrixOf {
  Void* data;
  Kind kind;
  int64_t rows, cols;
  int64_t stride_row, stride_col;

  MatrixOf transposed() const { return {data, kind, cols, rows, stride_col, stride_row}; }

  operator MatrixOf<const void>() const
    requires(!std::is_const_v<Void>)
  {
    return {data, kind, rows, cols, stride_row, stride_col};
  }
};

using ConstMatrix = MatrixOf<const void>;  // an operand
using Matrix = MatrixOf<void>;             // a result

// What products are computed from: bfloat16 as it is, float16 as float32 (there is no product of
// float16 with a float32 accumulator before AVX512-FP16 and AMX-FP16).
//
// Pairs of bfloat16 are multiplied together, so that the inner axis of a bfloat16 product is even.
template <typename C>
constexpr int kStep = std::is_same_v<C, BFloat16> ? 2 : 1;

template <typename C>
constexpr int64_t padded(int64_t k) {
  return ceil_div(k, kStep<C>) * kStep<C>;
}

}  // namespace lora_kernels
