// What the files of the boundary share: tensors become what the kernels take.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <vector>

#include "dropout.h"
#include "four_bit.h"
#include "linear.h"
#include "matrix.h"
#include "panel.h"

namespace lora_kernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_dropout_p(double dropout_p) {
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p must be in [0, 1), got ",
                    dropout_p);
}

inline DropoutMask dropout_mask(const Tensor& rng, double dropout_p) {
  check_dropout_p(dropout_p);
  TORCH_CHECK_TYPE(rng.scalar_type() == at::kLong, "rng must be int64, got ", rng.scalar_type());
  TORCH_CHECK_VALUE(rng.dim() == 1 && rng.size(0) == 4 && rng.is_contiguous(),
                    "rng must be (seed, offset, row0, col0), contiguous [4], got sizes ",
                    rng.sizes(), " and strides ", rng.strides());
  const int64_t* values = rng.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(values[3] >= 0, "col0, the last of rng, must not be negative, got ", values[3]);
  return {static_cast<uint64_t>(values[0]), static_cast<uint64_t>(values[1]), values[2], values[3],
          dropout_threshold(dropout_p)};
}

inline std::optional<DropoutMask> dropout_mask(const OptionalTensor& rng, double dropout_p) {
  check_dropout_p(dropout_p);
  if (!rng) return std::nullopt;
  return dropout_mask(*rng, dropout_p);
}

inline const DropoutMask* pointer(const std::optional<DropoutMask>& mask) {
  return mask ? &*mask : nullptr;
}

inline std::optional<Kind> kind_or_none(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Kind::kFloat;
    case at::kBFloat16:
      return Kind::kBFloat16;
    case at::kHalf:
      return Kind::kHalf;
    default:
      return std::nullopt;
  }
}

// Void is const void for an operand and void for a result.
template <typename Void>
Void* data_of(const Tensor& t) {
  if constexpr (std::is_const_v<Void>) {
    return t.const_data_ptr();
  } else {
    return t.mutable_data_ptr();
  }
}

template <typename Void = const void>
MatrixOf<Void> matrix(const Tensor& t, const char* name) {
  const auto kind = kind_or_none(t.scalar_type());
  TORCH_CHECK_TYPE(kind, name, " must be float32, bfloat16 or float16, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 2, name, " must have two dimensions, got ", t.sizes());
  TORCH_CHECK_VALUE(t.is_cpu() && t.layout() == at::kStrided, name, " must be a plain CPU tensor");
  return {data_of<Void>(t), *kind, t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// A matrix that the kernels write.
inline Matrix result(const Tensor& t) { return matrix<void>(t, "a result"); }

// What rows of a dtype are multiplied in: also what S and D are stored in and adapters are rounded
// to, reference.py's tail_dtype.
inline at::ScalarType compute_type(at::ScalarType rows) {
  return rows == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
}

// An adapter as packing reads it: as it is where it is of the rows' own type or float32, else
// rounded to what the rows are multiplied in.
inline Tensor adapter(const Tensor& t, at::ScalarType rows) {
  const bool as_it_is = t.scalar_type() == rows || t.scalar_type() == at::kFloat;
  return as_it_is ? t : t.to(compute_type(rows));
}

inline void check_shape(const Tensor& t, const char* name, int64_t rows, int64_t cols) {
  TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name, " must be [",
                    rows, ", ", cols, "], got ", t.sizes());
}

inline void check_vector(const OptionalTensor& t, const char* name, int64_t n) {
  TORCH_CHECK_VALUE(!t || (t->dim() == 1 && t->size(0) == n), name, " must be [", n, "], got ",
                    t->sizes());
  TORCH_CHECK_TYPE(!t || t->is_floating_point(), name, " must be a floating tensor, got ",
                   t->scalar_type());
}

// A vector [n] in contiguous float32, or nothing.
inline OptionalTensor vector(const OptionalTensor& t, const char* name, int64_t n) {
  check_vector(t, name, n);
  if (!t) return std::nullopt;
  return t->to(at::kFloat).contiguous();
}

inline const float* pointer(const OptionalTensor& t) {
  return t ? t->const_data_ptr<float>() : nullptr;
}

// The panels of a weight [K, N] that were packed before, or null.
template <typename C>
const C* panels_of(const OptionalTensor& packed, int64_t K, int64_t N) {
  if (!packed) return nullptr;
  TORCH_CHECK_VALUE(packed->scalar_type() == c10::CppTypeToScalarType<C>::value &&
                        packed->is_contiguous() && packed->numel() == packed_size<C>(K, N),
                    "packed is not of a weight with these sizes and dtype");
  return packed->const_data_ptr<C>();
}

// What the bytes of a four-bit weight mean, see dequantize's schema; or nothing.
using Quant = std::optional<std::vector<Tensor>>;

// The weight under the adapters as products read it.
struct Weight {
  ConstMatrix matrix;  // [K, N]; of a four-bit one the sizes alone
  std::optional<FourBit> four_bit;

  const FourBit* bytes() const { return four_bit ? &*four_bit : nullptr; }
};

FourBit four_bit_of(const Tensor& data, const std::vector<Tensor>& quant, int64_t block,
                    int64_t rows, int64_t cols, bool inner);

// Of `given` [K, N], or [N, K] with `transposed`, in the dtype of the rows or in four bits.
Weight base_weight(const Tensor& given, int64_t K, int64_t N, bool transposed, at::ScalarType rows,
                   const Quant& quant, int64_t block);

// Rows that products read where they lie: of their type, neighbours along the inner axis, and
// nothing to be padded.
template <typename C>
bool are_rows(const ConstMatrix& m) {
  return m.kind == kind_of<C> && (m.stride_col == 1 || m.cols == 1) && padded<C>(m.cols) == m.cols;
}

inline float factor(const Tensor& scale, double dropout_p) {
  TORCH_CHECK_TYPE(scale.scalar_type() == at::kFloat, "scale must be float32, got ",
                   scale.scalar_type());
  TORCH_CHECK_VALUE(scale.numel() == 1, "scale must hold one number, got ", scale.sizes());
  return static_cast<float>(*scale.const_data_ptr<float>() / (1.0 - dropout_p));
}

// Rows as the products read them: the tensor itself where its layout allows, else a copy in `copy`.
template <typename C>
Rows<C> as_rows(const Tensor& x, const char* name, Tensor& copy) {
  const ConstMatrix m = matrix(x, name);
  const int64_t ld = padded<C>(m.cols);
  if (are_rows<C>(m)) return {static_cast<const C*>(m.data), m.rows, m.cols, m.stride_row};
  copy = at::empty({m.rows, ld}, x.options().dtype(c10::CppTypeToScalarType<C>::value));
  C* data = copy.mutable_data_ptr<C>();
  copy_all_rows(m, data, ld);
  return {data, m.rows, m.cols, ld};
}

// Of a gradient: its dtype if that is stored directly, else float32, which is cast at the end.
inline at::TensorOptions stored_as(const Tensor& like, at::ScalarType dtype) {
  return like.options().dtype(kind_or_none(dtype) ? dtype : at::kFloat);
}

// f<C>() for the type C that rows of this dtype are multiplied in.
template <typename F>
auto with_compute_type(const Tensor& rows, F f) {
  return compute_type(rows.scalar_type()) == at::kBFloat16 ? f.template operator()<BFloat16>()
                                                           : f.template operator()<float>();
}

}  // namespace lora_kernels
