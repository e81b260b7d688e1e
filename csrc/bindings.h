// What the files of the boundary share: tensors become what the kernels take.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "dropout.h"
#include "matrix.h"

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

inline Matrix matrix(const Tensor& t, const char* name) {
  const auto kind = kind_or_none(t.scalar_type());
  TORCH_CHECK_TYPE(kind, name, " must be float32, bfloat16 or float16, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() == 2, name, " must have two dimensions, got ", t.sizes());
  TORCH_CHECK_VALUE(t.is_cpu() && t.layout() == at::kStrided, name, " must be a plain CPU tensor");
  return {
      const_cast<void*>(t.const_data_ptr()), *kind, t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

// An adapter's matrix in a type that packing reads: the rows' own, or float32 for bfloat16 rows.
inline Tensor adapter(const Tensor& t, at::ScalarType rows) {
  const bool read =
      t.scalar_type() == rows || (rows == at::kBFloat16 && t.scalar_type() == at::kFloat);
  return read ? t : t.to(rows);
}

// Of a gradient: its dtype if that is stored directly, else float32, which is cast at the end.
inline at::TensorOptions stored_as(const Tensor& like, at::ScalarType dtype) {
  return like.options().dtype(kind_or_none(dtype) ? dtype : at::kFloat);
}

// Calls f with a null pointer of what rows of this dtype are multiplied in.
template <typename F>
auto with_compute_type(const Tensor& rows, F f) {
  return rows.scalar_type() == at::kBFloat16 ? f(static_cast<BFloat16*>(nullptr))
                                             : f(static_cast<float*>(nullptr));
}

}  // namespace lora_kernels
