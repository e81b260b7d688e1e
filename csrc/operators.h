// The operators of one adapter as the boundary registers them, for the node that calls them too.
#pragma once

#include <optional>
#include <tuple>

#include "bindings.h"

namespace lora_kernels {

Tensor lora_shrink(const Tensor& x, const Tensor& lora_a, const Tensor& scale,
                   const OptionalTensor& rng, double dropout_p);

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x, const Tensor& weight,
                                           const Tensor& lora_a, const Tensor& lora_b,
                                           const Tensor& scale, const OptionalTensor& bias,
                                           const OptionalTensor& rng, double dropout_p,
                                           bool fan_in_fan_out, const OptionalTensor& out_scale,
                                           const OptionalTensor& packed, const Quant& quant,
                                           int64_t quant_block);

std::tuple<Tensor, Tensor> lora_linear_dx(const Tensor& dy, const Tensor& weight,
                                          const Tensor& lora_a, const Tensor& lora_b,
                                          const Tensor& scale, const OptionalTensor& rng,
                                          double dropout_p, bool fan_in_fan_out,
                                          const OptionalTensor& out_scale,
                                          const OptionalTensor& packed, const Quant& quant,
                                          int64_t quant_block);

std::tuple<Tensor, Tensor, Tensor> lora_linear_dab(const Tensor& dy, const OptionalTensor& x,
                                                   const OptionalTensor& s, const OptionalTensor& d,
                                                   const OptionalTensor& rng, double dropout_p,
                                                   std::optional<at::ScalarType> da_dtype,
                                                   std::optional<at::ScalarType> db_dtype,
                                                   std::optional<at::ScalarType> dbias_dtype,
                                                   const OptionalTensor& out_scale);

}  // namespace lora_kernels
