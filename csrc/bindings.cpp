// The boundary: tensors are checked here and leave as raw pointers, sizes and strides.
#include "bindings.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <torch/library.h>

#include <string>
#include <tuple>

#include "dropout.h"
#include "linear.h"
#include "operators.h"
#include "panel.h"
#include "product.h"

#define LORA_KERNELS_STRING_(name) #name
#define LORA_KERNELS_STRING(name) LORA_KERNELS_STRING_(name)

namespace lora_kernels {

namespace {

std::string isa() { return LORA_KERNELS_STRING(LORA_KERNELS_ISA); }

std::string bfloat16_product_name() {
  switch (bfloat16_product()) {
    case Bfloat16Product::kFloat:
      return "float";
    case Bfloat16Product::kDot:
      return "dot";
    default:
      return "brgemm";
  }
}

bool set_bfloat16_product_name(const std::string& name) {
  TORCH_CHECK_VALUE(name == "float" || name == "dot" || name == "brgemm",
                    "a product of bfloat16 is one of float, dot and brgemm, got ", name);
  return set_bfloat16_product(name == "float" ? Bfloat16Product::kFloat
                              : name == "dot" ? Bfloat16Product::kDot
                                              : Bfloat16Product::kBrgemm);
}

template <typename Bits>
void masked_into(const Tensor& x, const Tensor& out, const DropoutMask& mask) {
  masked(static_cast<const Bits*>(x.const_data_ptr()), static_cast<Bits*>(out.mutable_data_ptr()),
         x.size(0), x.size(1), x.stride(0), x.stride(1), mask);
}

Tensor masked_cpu(const Tensor& x, const Tensor& rng, double dropout_p) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      "x must be float32, float64, bfloat16 or float16, got ", dtype);
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be [M, K], got ", x.sizes());
  const DropoutMask mask = dropout_mask(rng, dropout_p);

  Tensor out = at::empty(x.sizes(), x.options());
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
Tensor masked_elsewhere(const Tensor& x, const Tensor& rng, double /*dropout_p*/) {
  TORCH_CHECK_VALUE(false, "x and rng must be plain CPU tensors, got x on ", x.device(), " (",
                    x.layout(), ") and rng on ", rng.device(), " (", rng.layout(), ")");
}

// S or D [M, r], and the same as rows of a product: one tensor where it serves.
template <typename C>
struct Shrunk {
  Tensor s, s_rows;

  Shrunk(const Rows<C>& x, const ConstMatrix& a, float scale, const DropoutMask* mask,
         at::TensorOptions options) {
    const int64_t r = a.rows, ld = padded<C>(r);
    options = options.dtype(c10::CppTypeToScalarType<C>::value);
    s = at::empty({x.M, r}, options);
    const bool serves = ld == r;
    s_rows = serves ? s : at::empty({x.M, ld}, options);
    if (x.M == 0) return;
    C* const apart = serves ? nullptr : s_rows.mutable_data_ptr<C>();
    const Shrink<C> job = {x, a, scale, mask, result(s), nullptr, apart};
    shrink(&job, 1);
  }

  Rows<C> rows() const {
    return {s_rows.const_data_ptr<C>(), s.size(0), s.size(1), s_rows.size(1)};
  }
};

}  // namespace

Tensor lora_shrink(const Tensor& x, const Tensor& lora_a, const Tensor& scale,
                   const OptionalTensor& rng, double dropout_p) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(x.dim() == 2 && lora_a.dim() == 2 && x.size(1) == lora_a.size(1),
                    "x [M, K] and lora_a [r, K] do not fit: ", x.sizes(), ", ", lora_a.sizes());
  const Tensor a = adapter(lora_a, x.scalar_type());
  const auto mask = dropout_mask(rng, dropout_p);
  return with_compute_type(x, [&]<typename C>() {
    Tensor copy;
    const Rows<C> rows = as_rows<C>(x, "x", copy);
    return Shrunk<C>(rows, matrix(a, "lora_a"), factor(scale, dropout_p), pointer(mask),
                     x.options())
        .s;
  });
}

namespace {

// out_scale * dY, rounded once to what it is multiplied in; dY itself without an out_scale.
Tensor scaled_rows(const Tensor& dy, const OptionalTensor& out_scale) {
  if (!out_scale) return dy;
  const auto type = compute_type(dy.scalar_type());
  return at::mul(dy.to(type), *out_scale).to(type);
}

// y = out_scale (rows w + mask * (s b)) + bias in `dtype`, with s = scale (rows_mask * rows) a^T:
// the forward and, with the roles of A and B swapped, dX.
std::tuple<Tensor, Tensor> shrink_and_product(
    const Tensor& x, at::ScalarType dtype, const Weight& w, const Tensor& a, const Tensor& b,
    float scale, const DropoutMask* rows_mask, const DropoutMask* tail_mask,
    const OptionalTensor& out_scale, const OptionalTensor& bias, const OptionalTensor& packed) {
  const Tensor a_read = adapter(a, dtype), b_read = adapter(b, dtype);
  const int64_t M = x.size(0), N = w.matrix.cols;
  Tensor y = at::empty({M, N}, x.options().dtype(dtype));
  return with_compute_type(x, [&]<typename C>() {
    const C* panels = panels_of<C>(packed, w.matrix.rows, N);
    Tensor copy;
    const Rows<C> rows = as_rows<C>(x, "the rows", copy);
    const Shrunk<C> s(rows, matrix(a_read, "an adapter"), scale, rows_mask, x.options());
    const Tail<C> tail = {s.rows(), matrix(b_read, "an adapter"), 0, tail_mask};
    const TailedRows<C> all = {0, M, &tail, 1};
    tail_product<C>({rows, w.matrix, panels, &all, 1, nullptr, nullptr, pointer(out_scale),
                     pointer(bias), result(y), false, nullptr, 0, w.bytes()});
    return std::make_tuple(y, s.s);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> lora_linear_fwd(const Tensor& x, const Tensor& weight,
                                           const Tensor& lora_a, const Tensor& lora_b,
                                           const Tensor& scale, const OptionalTensor& bias,
                                           const OptionalTensor& rng, double dropout_p,
                                           bool fan_in_fan_out, const OptionalTensor& out_scale,
                                           const OptionalTensor& packed, const Quant& quant,
                                           int64_t quant_block) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(x.dim() == 2 && lora_a.dim() == 2 && lora_b.dim() == 2,
                    "x, lora_a and lora_b must have two dimensions");
  const int64_t K = x.size(1), r = lora_a.size(0), N = lora_b.size(0);
  check_shape(lora_a, "lora_a", r, K);
  check_shape(lora_b, "lora_b", N, r);
  const Weight w = base_weight(weight, K, N, !fan_in_fan_out, x.scalar_type(), quant, quant_block);
  const auto mask = dropout_mask(rng, dropout_p);
  return shrink_and_product(x, x.scalar_type(), w, lora_a, lora_b.t(), factor(scale, dropout_p),
                            pointer(mask), nullptr, vector(out_scale, "out_scale", N),
                            vector(bias, "bias", N), packed);
}

std::tuple<Tensor, Tensor> lora_linear_dx(const Tensor& dy, const Tensor& weight,
                                          const Tensor& lora_a, const Tensor& lora_b,
                                          const Tensor& scale, const OptionalTensor& rng,
                                          double dropout_p, bool fan_in_fan_out,
                                          const OptionalTensor& out_scale,
                                          const OptionalTensor& packed, const Quant& quant,
                                          int64_t quant_block) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(dy.dim() == 2 && lora_a.dim() == 2 && lora_b.dim() == 2,
                    "dy, lora_a and lora_b must have two dimensions");
  const int64_t N = dy.size(1), r = lora_a.size(0), K = lora_a.size(1);
  check_shape(lora_b, "lora_b", N, r);
  const Weight w = base_weight(weight, N, K, fan_in_fan_out, dy.scalar_type(), quant, quant_block);
  const auto mask = dropout_mask(rng, dropout_p);
  check_vector(out_scale, "out_scale", N);
  return shrink_and_product(scaled_rows(dy, out_scale), dy.scalar_type(), w, lora_b.t(), lora_a,
                            factor(scale, dropout_p), nullptr, pointer(mask), std::nullopt,
                            std::nullopt, packed);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_dab(const Tensor& dy, const OptionalTensor& x,
                                                   const OptionalTensor& s, const OptionalTensor& d,
                                                   const OptionalTensor& rng, double dropout_p,
                                                   std::optional<at::ScalarType> da_dtype,
                                                   std::optional<at::ScalarType> db_dtype,
                                                   std::optional<at::ScalarType> dbias_dtype,
                                                   const OptionalTensor& out_scale) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const ConstMatrix rows = matrix(dy, "dy");
  const auto mask = dropout_mask(rng, dropout_p);
  Tensor da = at::empty({0}, dy.options()), db = da, dbias = da, scaled = dy;
  check_vector(out_scale, "out_scale", rows.cols);
  TORCH_CHECK_VALUE(!da_dtype || (x && d), "dA needs x and d");
  TORCH_CHECK_VALUE(!db_dtype || s, "dB needs s");
  if (db_dtype) scaled = scaled_rows(dy, out_scale);

  with_compute_type(dy, [&]<typename C>() {
    Reduction<C> reductions[3];
    int count = 0;
    if (da_dtype) {
      const ConstMatrix x_rows = matrix(*x, "x"), tail = matrix(*d, "d");
      TORCH_CHECK_VALUE(x_rows.rows == rows.rows && tail.rows == rows.rows,
                        "dy, x and d differ in rows: ", dy.sizes(), ", ", x->sizes(), ", ",
                        d->sizes());
      da = at::empty({tail.cols, x_rows.cols}, stored_as(dy, *da_dtype));
      reductions[count++] = {tail, x_rows, pointer(mask), result(da), {}};
    }
    if (db_dtype) {
      const ConstMatrix tail = matrix(*s, "s");
      TORCH_CHECK_VALUE(tail.rows == rows.rows, "dy and s differ in rows: ", dy.sizes(), ", ",
                        s->sizes());
      db = at::empty({rows.cols, tail.cols}, stored_as(dy, *db_dtype));
      reductions[count++] = {tail, matrix(scaled, "dy"), nullptr, result(db).transposed(), {}};
    }
    if (dbias_dtype) {
      dbias = at::empty({rows.cols}, stored_as(dy, *dbias_dtype));
      const Matrix sums = result(dbias.unsqueeze(0));
      if (db_dtype && !out_scale) {
        reductions[count - 1].sums = sums;
      } else {
        reductions[count++] = {{}, rows, nullptr, {}, sums};
      }
    }
    reduce(reductions, count);
  });
  if (da_dtype) da = da.to(*da_dtype);
  if (db_dtype) db = db.to(*db_dtype);
  if (dbias_dtype) dbias = dbias.to(*dbias_dtype);
  return {da, db, dbias};
}

namespace {

Tensor pack_cpu(const Tensor& b) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const ConstMatrix m = matrix(b, "b");
  return with_compute_type(b, [&]<typename C>() {
    const auto options = b.options().dtype(c10::CppTypeToScalarType<C>::value);
    Tensor packed = at::empty({packed_size<C>(m.rows, m.cols)}, options);
    pack(m, packed.mutable_data_ptr<C>());
    return packed;
  });
}

bool is_packed_cpu(const Tensor& b, const Tensor& packed) {
  const ConstMatrix m = matrix(b, "b");
  return with_compute_type(b, [&]<typename C>() {
    return packed.scalar_type() == c10::CppTypeToScalarType<C>::value && packed.is_contiguous() &&
           packed.numel() == packed_size<C>(m.rows, m.cols) && m.rows > 0 && m.cols > 0 &&
           is_packed(m, packed.const_data_ptr<C>());
  });
}

}  // namespace

TORCH_LIBRARY(lora_kernels_cpu, m) {
  m.def("isa() -> str", &isa);
  m.def("bfloat16_product() -> str", &bfloat16_product_name);
  m.def("set_bfloat16_product(str name) -> bool", &set_bfloat16_product_name);
  m.def("masked(Tensor x, Tensor rng, float dropout_p) -> Tensor");
  // b is [K, N] with the inner axis first: weight.t() for the forward, weight for dX.
  m.def("pack(Tensor b) -> Tensor");
  m.def("is_packed(Tensor b, Tensor packed) -> bool");
  m.def(
      "lora_shrink(Tensor x, Tensor lora_a, Tensor scale, Tensor? rng=None, "
      "float dropout_p=0.0) -> Tensor");
  m.def(
      "lora_linear_fwd(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale, "
      "Tensor? bias=None, Tensor? rng=None, float dropout_p=0.0, bool fan_in_fan_out=False, "
      "Tensor? out_scale=None, Tensor? packed=None, Tensor[]? quant=None, int quant_block=0) "
      "-> (Tensor, Tensor)");
  m.def(
      "lora_linear_dx(Tensor dy, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale, "
      "Tensor? rng=None, float dropout_p=0.0, bool fan_in_fan_out=False, "
      "Tensor? out_scale=None, Tensor? packed=None, Tensor[]? quant=None, int quant_block=0) "
      "-> (Tensor, Tensor)");
  m.def(
      "lora_linear_dab(Tensor dy, Tensor? x, Tensor? s, Tensor? d, Tensor? rng=None, "
      "float dropout_p=0.0, ScalarType? da_dtype=None, ScalarType? db_dtype=None, "
      "ScalarType? dbias_dtype=None, Tensor? out_scale=None) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("masked", &masked_cpu);
  m.impl("pack", &pack_cpu);
  m.impl("is_packed", &is_packed_cpu);
  m.impl("lora_shrink", &lora_shrink);
  m.impl("lora_linear_fwd", &lora_linear_fwd);
  m.impl("lora_linear_dx", &lora_linear_dx);
  m.impl("lora_linear_dab", &lora_linear_dab);
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("masked", &masked_elsewhere);
}

}  // namespace lora_kernels
