// The boundary: tensors are checked here and leave as raw pointers, sizes and strides.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "dropout.h"

#define LORA_KERNELS_STRING_(name) #name
#define LORA_KERNELS_STRING(name) LORA_KERNELS_STRING_(name)

namespace lora_kernels {

namespace {

std::string isa() { return LORA_KERNELS_STRING(LORA_KERNELS_ISA); }

DropoutMask dropout_mask(const at::Tensor& rng, double dropout_p) {
  TORCH_CHECK_TYPE(rng.scalar_type() == at::kLong, "rng must be int64, got ", rng.scalar_type());
  TORCH_CHECK_VALUE(rng.dim() == 1 && rng.size(0) == 4 && rng.is_contiguous(),
                    "rng must be (seed, offset, row0, col0), contiguous [4], got sizes ",
                    rng.sizes(), " and strides ", rng.strides());
  TORCH_CHECK_VALUE(dropout_p >= 0.0 && dropout_p < 1.0, "dropout_p must be in [0, 1), got ",
                    dropout_p);
  const int64_t* values = rng.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(values[3] >= 0, "col0, the last of rng, must not be negative, got ", values[3]);
  return {static_cast<uint64_t>(values[0]), static_cast<uint64_t>(values[1]), values[2], values[3],
          dropout_threshold(dropout_p)};
}

template <typename Bits>
void masked_into(const at::Tensor& x, const at::Tensor& out, const DropoutMask& mask) {
  masked(static_cast<const Bits*>(x.const_data_ptr()), static_cast<Bits*>(out.mutable_data_ptr()),
         x.size(0), x.size(1), x.stride(0), x.stride(1), mask);
}

at::Tensor masked_cpu(const at::Tensor& x, const at::Tensor& rng, double dropout_p) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      "x must be float32, float64, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be [M, K], got ", x.sizes());
  const DropoutMask mask = dropout_mask(rng, dropout_p);

  at::Tensor out = at::empty(x.sizes(), x.options());
  switch (x.element_size()) {
    case 2:
      masked_into<uint16_t>(x, out, mask);
      break;
    case 4:
      masked_into<uint32_t>(x, out, mask);
      break;
    default:
      masked_into<uint64_t>(x, out, mask);
  }
  return out;
}

// The dispatcher comes here with every tensor that is not a plain CPU one. Without this it would
// raise NotImplementedError, which a caller cannot tell from a missing kernel.
at::Tensor masked_elsewhere(const at::Tensor& x, const at::Tensor& rng, double /*dropout_p*/) {
  TORCH_CHECK_VALUE(false, "x and rng must be plain CPU tensors, got x on ", x.device(), " (",
                    x.layout(), ") and rng on ", rng.device(), " (", rng.layout(), ")");
}

}  // namespace

TORCH_LIBRARY(lora_kernels_cpu, m) {
  m.def("isa() -> str", &isa);
  m.def("masked(Tensor x, Tensor rng, float dropout_p) -> Tensor");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) { m.impl("masked", &masked_cpu); }

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("masked", &masked_elsewhere);
}

}  // namespace lora_kernels
