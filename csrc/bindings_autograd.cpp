// lora_linear with its node of the autograd graph in C++: functional/linear.py's _LoRALinear, for
// calls that the native plan answers.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <atomic>
#include <utility>
#include <vector>

#include "operators.h"

namespace lora_kernels {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// answers.py's count of recorders and forced plans, int64 [1], which Python writes.
std::atomic<int64_t*> watchers = nullptr;

void watch(const Tensor& count) {
  TORCH_CHECK(count.scalar_type() == at::kLong && count.numel() == 1,
              "the count must be int64 [1]");
  static const Tensor kept = count;
  watchers = kept.mutable_data_ptr<int64_t>();
}

// Whether each operator of a backward must be called by its name, so that it is recorded, or
// answered by a forced plan; also until Python registers the count.
bool is_watched() {
  // Not std::atomic_ref, which some of the compilers' libraries lack.
  const int64_t* count = watchers;
  return count == nullptr || __atomic_load_n(count, __ATOMIC_RELAXED) != 0;
}

// A function with the name and the signature of an operator of ops.py, which its dispatcher
// answers: another plan than the native one, a mode, a tensor that is not plain.
template <const char* kName, typename Signature>
struct Dispatched;

template <const char* kName, typename Result, typename... Arguments>
struct Dispatched<kName, Result(Arguments...)> {
  static Result call(Arguments... arguments) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow(kName, "")
                               .template typed<Result(Arguments...)>();
    return op.call(std::forward<Arguments>(arguments)...);
  }
};

constexpr char kShrink[] = "lora_kernels::lora_shrink";
constexpr char kDx[] = "lora_kernels::lora_linear_dx";
constexpr char kDab[] = "lora_kernels::lora_linear_dab";

struct Operators {
  decltype(&lora_shrink) shrink;
  decltype(&lora_linear_dx) dx;
  decltype(&lora_linear_dab) dab;
};

constexpr Operators kNative = {&lora_shrink, &lora_linear_dx, &lora_linear_dab};
constexpr Operators kDispatched = {&Dispatched<kShrink, decltype(lora_shrink)>::call,
                                   &Dispatched<kDx, decltype(lora_linear_dx)>::call,
                                   &Dispatched<kDab, decltype(lora_linear_dab)>::call};

// The kernels read memory, where a negation that is still to be done is not.
Tensor resolved(const Tensor& t) { return t.is_neg() ? t.resolve_neg() : t; }

// [..., K] as [M, K] in the compute dtype; a view wherever dtype and strides allow one.
Tensor rows_of(const Tensor& x, at::ScalarType dtype) {
  const Tensor rows = x.to(dtype);
  if (rows.dim() == 2) return rows;
  if (rows.dim() == 1) return rows.unsqueeze(0);
  // Not flatten: batches of gradients (is_grads_batched=True) have no rule for it.
  const int64_t k = rows.size(-1);
  return rows.reshape({c10::multiply_integers(rows.sizes().slice(0, rows.dim() - 1)), k});
}

// Gradients that a graph was asked for: differentiating them raises.
struct OnceDifferentiable : torch::autograd::Function<OnceDifferentiable> {
  static variable_list forward(AutogradContext* /*ctx*/, const Tensor& /*grad*/,
                               const variable_list& gradients) {
    return gradients;
  }
  static variable_list backward(AutogradContext* /*ctx*/, const variable_list& /*grads*/) {
    TORCH_CHECK(false,
                "trying to differentiate twice lora_linear, which is once_differentiable: second "
                "derivatives are not defined");
  }
};

struct LoRALinear : torch::autograd::Function<LoRALinear> {
  // The variables first: needs_input_grad counts them.
  enum Input { kX, kWeight, kA, kB, kScale, kBias };
  static constexpr size_t kInputs = 12;

  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& lora_a, const Tensor& lora_b, const Tensor& scale,
                        const OptionalTensor& bias, const OptionalTensor& rng, double dropout_p,
                        bool fan_in_fan_out, at::ScalarType dtype, const OptionalTensor& packed,
                        const OptionalTensor& packed_dx) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor rows = rows_of(x, dtype);
    auto [y, s] = lora_linear_fwd(rows, weight.to(dtype), lora_a, lora_b, scale, bias, rng,
                                  dropout_p, fan_in_fan_out, std::nullopt, packed, std::nullopt, 0);
    ctx->save_for_backward({lora_a.requires_grad() ? x : Tensor(),
                            lora_b.requires_grad() ? s : Tensor(), weight, lora_a, lora_b, scale,
                            rng.value_or(Tensor())});
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["fan_in_fan_out"] = fan_in_fan_out;
    ctx->saved_data["dtype"] = dtype;
    ctx->saved_data["x_dtype"] = x.scalar_type();
    if (x.dim() != 2) ctx->saved_data["x_sizes"] = x.sizes().vec();
    if (bias) ctx->saved_data["bias_dtype"] = bias->scalar_type();
    // Not among the saved variables: a copy of one, which its owner keeps.
    if (packed_dx) ctx->saved_data["packed_dx"] = *packed_dx;
    if (x.dim() == 2) return y;
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.back() = y.size(1);
    return y.view(sizes);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const bool graph = at::GradMode::is_enabled();
    // Unpacking may compute the forward once more, graph and all.
    const variable_list saved = ctx->get_saved_variables();
    const variable_list gradients = differentiate(ctx, saved, grads[0]);
    return graph ? once(grads[0], gradients) : gradients;
  }

 private:
  static variable_list differentiate(AutogradContext* ctx, const variable_list& saved,
                                     const Tensor& grad) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto &x = saved[0], &s = saved[1], &weight = saved[2], &lora_a = saved[3],
               &lora_b = saved[4], &scale = saved[5];
    const OptionalTensor rng = if_defined(saved[6]);
    const auto& data = ctx->saved_data;
    const double dropout_p = data.at("dropout_p").toDouble();
    const bool fan_in_fan_out = data.at("fan_in_fan_out").toBool();
    const at::ScalarType dtype = data.at("dtype").toScalarType();
    const auto packed = data.find("packed_dx"), bias_dtype = data.find("bias_dtype");
    const bool need_x = ctx->needs_input_grad(kX), need_a = ctx->needs_input_grad(kA),
               need_b = ctx->needs_input_grad(kB),
               need_bias = bias_dtype != data.end() && ctx->needs_input_grad(kBias);
    const Tensor dy = rows_of(resolved(grad), dtype);
    const Operators& ops = is_plain(dy) && !is_watched() ? kNative : kDispatched;

    variable_list gradients(kInputs);
    Tensor d;
    if (need_x) {
      std::tie(gradients[kX], d) = ops.dx(
          dy, weight.to(dtype), lora_a, lora_b, scale, rng, dropout_p, fan_in_fan_out, std::nullopt,
          packed == data.end() ? OptionalTensor() : packed->second.toTensor(), std::nullopt, 0);
      gradients[kX] = gradients[kX].to(data.at("x_dtype").toScalarType());
      const auto x_sizes = data.find("x_sizes");
      if (x_sizes != data.end()) {
        gradients[kX] = gradients[kX].view(x_sizes->second.toIntVector());
      }
    } else if (need_a) {
      // D = c dY B: no mask, only its 1/(1-p).
      d = ops.shrink(dy, lora_b.t(), scale, std::nullopt, dropout_p);
    }
    if (need_a || need_b || need_bias) {
      const auto none = std::optional<at::ScalarType>();
      auto [da, db, dbias] = ops.dab(
          dy, need_a ? OptionalTensor(rows_of(x, dtype)) : std::nullopt,
          need_b ? OptionalTensor(s) : std::nullopt, need_a ? OptionalTensor(d) : std::nullopt, rng,
          dropout_p, need_a ? lora_a.scalar_type() : none, need_b ? lora_b.scalar_type() : none,
          need_bias ? bias_dtype->second.toScalarType() : none, std::nullopt);
      if (need_a) gradients[kA] = da;
      if (need_b) gradients[kB] = db;
      if (need_bias) gradients[kBias] = dbias;
    }
    return gradients;
  }

  static variable_list once(const Tensor& grad, const variable_list& gradients) {
    variable_list defined;
    for (const Tensor& t : gradients) {
      if (t.defined()) defined.push_back(t);
    }
    const variable_list guarded = OnceDifferentiable::apply(grad, defined);
    variable_list all(kInputs);
    for (size_t i = 0, j = 0; i < kInputs; ++i) {
      if (gradients[i].defined()) all[i] = guarded[j++];
    }
    return all;
  }

  static OptionalTensor if_defined(const Tensor& t) {
    return t.defined() ? OptionalTensor(t) : std::nullopt;
  }

  static bool is_plain(const Tensor& t) {
    // A batch of gradients and a tensor of zeros have no memory to read.
    return t.is_cpu() && t.layout() == at::kStrided && t.has_storage() && !t._is_zerotensor() &&
           !t.key_set().has(c10::DispatchKey::Python);
  }
};

Tensor lora_linear(const Tensor& x, const Tensor& weight, const Tensor& lora_a,
                   const Tensor& lora_b, const Tensor& scale, const OptionalTensor& bias,
                   const OptionalTensor& rng, double dropout_p, bool fan_in_fan_out,
                   at::ScalarType dtype, const OptionalTensor& packed,
                   const OptionalTensor& packed_dx) {
  TORCH_CHECK_VALUE(!weight.requires_grad(), "lora_linear has no gradient for a weight here");
  return LoRALinear::apply(resolved(x), resolved(weight), resolved(lora_a), resolved(lora_b),
                           resolved(scale), bias ? OptionalTensor(resolved(*bias)) : bias, rng,
                           dropout_p, fan_in_fan_out, dtype, packed, packed_dx);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_kernels_cpu, m) {
  // For a frozen weight, of operands that functional/linear.py has checked.
  m.def(
      "lora_linear(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale, "
      "Tensor? bias, Tensor? rng, float dropout_p, bool fan_in_fan_out, ScalarType dtype, "
      "Tensor? packed=None, Tensor? packed_dx=None) -> Tensor");
  m.def("watch(Tensor count) -> ()", &watch);
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, AutogradCPU, m) { m.impl("lora_linear", &lora_linear); }

}  // namespace lora_kernels
