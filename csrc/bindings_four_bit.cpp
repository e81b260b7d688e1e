// The boundary of four-bit weights.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bindings.h"

namespace lora_kernels {

namespace {

const float* floats(const Tensor& t, const char* name, int64_t n) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, name, " must be float32, got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous() && t.numel() == n, name, " must be [", n,
                    "] on the CPU, got ", t.sizes());
  return t.const_data_ptr<float>();
}

}  // namespace

FourBit four_bit_of(const Tensor& data, const std::vector<Tensor>& quant, int64_t block,
                    int64_t rows, int64_t cols, bool inner) {
  const int64_t bytes = ceil_div(rows * cols, 2),
                blocks = block > 0 ? ceil_div(rows * cols, block) : 0;
  TORCH_CHECK_VALUE(block >= 32 && (block & (block - 1)) == 0,
                    "a block of a four-bit weight has 32, 64, ... values, got ", block);
  TORCH_CHECK_VALUE(quant.size() == 2 || quant.size() == 5,
                    "a four-bit weight comes with code and absmax, or with code, absmax, code8, "
                    "outer and offset, got ",
                    quant.size(), " tensors");
  TORCH_CHECK_VALUE(data.is_cpu() && data.is_contiguous() && data.layout() == at::kStrided &&
                        data.numel() * static_cast<int64_t>(data.element_size()) == bytes,
                    "weight must be the ", bytes, " bytes of [", rows, ", ", cols, "], got ",
                    data.scalar_type(), " ", data.sizes());
  FourBit w = {};
  w.data = static_cast<const uint8_t*>(data.const_data_ptr());
  w.rows = rows;
  w.cols = cols;
  w.inner = inner;
  w.block = block;
  w.code = floats(quant[0], "code", 16);
  if (quant.size() == 2) {
    w.absmax = floats(quant[1], "absmax", blocks);
    return w;
  }
  TORCH_CHECK_VALUE(quant[1].scalar_type() == at::kByte && quant[1].is_cpu() &&
                        quant[1].is_contiguous() && quant[1].numel() == blocks,
                    "absmax must be uint8 [", blocks, "] on the CPU, got ", quant[1].scalar_type(),
                    " ", quant[1].sizes());
  w.absmax8 = quant[1].const_data_ptr<uint8_t>();
  w.code8 = floats(quant[2], "code8", 256);
  w.outer = floats(quant[3], "outer", ceil_div(blocks, 256));
  w.offset = *floats(quant[4], "offset", 1);
  return w;
}

Weight base_weight(const Tensor& given, int64_t K, int64_t N, bool transposed, at::ScalarType rows,
                   const Quant& quant, int64_t block) {
  const int64_t stored_rows = transposed ? N : K, stored_cols = transposed ? K : N;
  if (quant) {
    const FourBit w = four_bit_of(given, *quant, block, stored_rows, stored_cols, transposed);
    return {{nullptr, Kind::kFloat, K, N, 0, 0}, w};
  }
  check_shape(given, "weight", stored_rows, stored_cols);
  TORCH_CHECK_TYPE(rows == given.scalar_type(), "the rows are ", rows, " and weight is ",
                   given.scalar_type());
  const ConstMatrix stored = matrix(given, "weight");
  return {transposed ? stored.transposed() : stored, std::nullopt};
}

namespace {

Tensor dequantize(const Tensor& data, at::TensorList quant, int64_t block, int64_t rows,
                  int64_t cols, at::ScalarType dtype) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(rows >= 0 && cols >= 0, "the sizes must not be negative");
  TORCH_CHECK_TYPE(kind_or_none(dtype),
                   "a four-bit weight is decoded to float32, bfloat16 or "
                   "float16, not ",
                   dtype);
  const FourBit w = four_bit_of(data, quant.vec(), block, rows, cols, true);
  Tensor out = at::empty({rows, cols}, data.options().dtype(dtype));
  const Matrix m = result(out);
  with_type(m.kind, [&]<typename T>() { decode_all(w, static_cast<T*>(m.data)); });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_kernels_cpu, m) {
  // quant is QuantState.tensors(): code and absmax, or these and code8, outer and offset.
  m.def(
      "dequantize(Tensor data, Tensor[] quant, int block, int rows, int cols, ScalarType dtype) "
      "-> Tensor");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) { m.impl("dequantize", &dequantize); }

}  // namespace lora_kernels
