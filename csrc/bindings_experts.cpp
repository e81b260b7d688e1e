// The boundary of the operators of experts: rows sorted by expert, as products of different
// weights.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "batch.h"

namespace lora_kernels {

namespace {

// Rows [first, first + rows) of a batch, which belong to one expert.
struct Own {
  int64_t expert, first, rows;
};

// The experts that have rows, and how many rows all of them have.
struct Mixture {
  std::vector<Own> own;
  int64_t experts, live = 0;

  Mixture(const Tensor& offs, int64_t M) : experts(offs.numel()) {
    TORCH_CHECK_TYPE(offs.scalar_type() == at::kInt, "offs must be int32, got ",
                     offs.scalar_type());
    TORCH_CHECK_VALUE(offs.dim() == 1 && offs.is_cpu() && offs.is_contiguous(),
                      "offs must be a contiguous vector on the CPU, got ", offs.sizes());
    const int32_t* ends = offs.const_data_ptr<int32_t>();
    for (int64_t e = 0; e < experts; ++e) {
      TORCH_CHECK_VALUE(ends[e] >= live && ends[e] <= M, "offs of expert ", e, " is ", ends[e],
                        ": it must rise from 0 to at most the ", M, " rows");
      if (ends[e] > live) own.push_back({e, live, ends[e] - live});
      live = ends[e];
    }
  }
};

// [E, rows, cols], whose last two axes are those of a matrix.
void check_stack(const Tensor& t, const char* name, int64_t experts, int64_t rows, int64_t cols) {
  TORCH_CHECK_VALUE(t.dim() == 3 && t.size(0) == experts && t.size(1) == rows && t.size(2) == cols,
                    name, " must be [", experts, ", ", rows, ", ", cols, "], got ", t.sizes());
  TORCH_CHECK_VALUE(t.is_cpu() && t.layout() == at::kStrided, name, " must be a plain CPU tensor");
  TORCH_CHECK_TYPE(kind_or_none(t.scalar_type()), name,
                   " must be float32, bfloat16 or float16, got ", t.scalar_type());
}

// f(T*) for a type T of the size of t's elements, which are copied as they are.
template <typename F>
void with_bits(const Tensor& t, F f) {
  t.element_size() == 4 ? f(static_cast<float*>(nullptr)) : f(static_cast<uint16_t*>(nullptr));
}

// An adapter as packing reads it: PEFT's B, whose experts are neighbours, is copied first.
Tensor stack(const Tensor& t, const char* name, at::ScalarType rows, int64_t experts, int64_t n,
             int64_t k) {
  Tensor read = adapter(t, rows);
  check_stack(read, name, experts, n, k);
  if (read.stride(1) == 1 || read.stride(2) == 1) return read;
  const bool swapped = read.stride(1) < read.stride(2);  // B^T, for dX
  const Tensor b = swapped ? read.transpose(1, 2) : read;
  const Tensor stored = b.permute({1, 2, 0});  // [N, r, E]
  if (!stored.is_contiguous()) return read.contiguous();
  Tensor copy = at::empty(b.sizes(), b.options());
  with_bits(b, [&]<typename T>(T*) {
    experts_first(static_cast<const T*>(stored.const_data_ptr()), experts, b.size(1), b.size(2),
                  static_cast<T*>(copy.mutable_data_ptr()));
  });
  return swapped ? copy.transpose(1, 2) : copy;
}

// dB [E, N, r] as PEFT stores B: a view of [N, r, E].
Tensor as_stored(const Tensor& db) {
  Tensor stored = at::empty({db.size(1), db.size(2), db.size(0)}, db.options());
  with_bits(db, [&]<typename T>(T*) {
    experts_last(static_cast<const T*>(db.const_data_ptr()), db.size(0), db.size(1), db.size(2),
                 static_cast<T*>(stored.mutable_data_ptr()));
  });
  return stored.permute({2, 0, 1});
}

ConstMatrix of_expert(const Tensor& t, int64_t expert) {
  return part(t, expert, 0, t.size(1), t.size(2));
}

template <typename C>
Rows<C> rows_of(const Rows<C>& x, const Own& own) {
  return {x.data + own.first * x.ld, own.rows, x.K, x.ld};
}

Matrix rows_of(const Matrix& m, const Own& own) {
  Matrix part = m;
  with_type(m.kind,
            [&]<typename T>() { part.data = static_cast<T*>(m.data) + own.first * m.stride_row; });
  part.rows = own.rows;
  return part;
}

ConstMatrix rows_of(const ConstMatrix& m, const Own& own) {
  const Matrix part = rows_of(
      Matrix{const_cast<void*>(m.data), m.kind, m.rows, m.cols, m.stride_row, m.stride_col}, own);
  return part;
}

// S or D of rows [M, K] and a [E, r, K]: [M, r], as rows of products with `ld` between them.
template <typename C>
Tensor shrunk(const Mixture& mixture, const Rows<C>& x, const Tensor& a, float scale,
              const at::TensorOptions& options) {
  const int64_t r = a.size(1), ld = padded<C>(r);
  // With room for the pair that ends a row, which is then zero.
  Tensor s = at::empty({x.M, ld}, options.dtype(c10::CppTypeToScalarType<C>::value));
  C* data = s.template mutable_data_ptr<C>();
  std::vector<Shrink<C>> jobs;
  for (const Own& own : mixture.own) {
    jobs.push_back({rows_of(x, own),
                    of_expert(a, own.expert),
                    scale,
                    nullptr,
                    {},
                    nullptr,
                    data + own.first * ld});
  }
  shrink(jobs.data(), jobs.size());
  s.narrow(0, mixture.live, x.M - mixture.live).zero_();
  return s;
}

Tensor without_padding(const Tensor& s, int64_t r) {
  return s.size(1) == r ? s : s.narrow(1, 0, r).contiguous();
}

// The weights of experts, each [K, N] to a product: a stack of matrices or, flat one after the
// other, four-bit ones.
struct Weights {
  Tensor stack;  // [E, K, N]
  std::optional<FourBit> four_bit;
  int64_t K, N;

  // `transposed`: what is stored are [N, K].
  Weights(const Tensor& given, bool transposed, const Quant& quant, int64_t block, int64_t experts,
          int64_t K, int64_t N)
      : K(K), N(N) {
    if (quant) {
      const int64_t rows = transposed ? N : K, cols = transposed ? K : N;
      four_bit = four_bit_of(given, *quant, block, experts * rows, cols, transposed);
      return;
    }
    TORCH_CHECK_VALUE(given.dim() == 3, "weight must be 3-D, got ", given.sizes());
    stack = transposed ? given.transpose(1, 2) : given;
    check_stack(stack, "weight", experts, K, N);
  }

  ConstMatrix matrix(int64_t expert) const {
    return four_bit ? ConstMatrix{nullptr, Kind::kFloat, K, N, 0, 0} : of_expert(stack, expert);
  }

  FourBit bytes(int64_t expert) const {
    const int64_t rows = four_bit->inner ? N : K;
    return four_bit->part(expert * rows, rows);
  }
};

// y = x w + s b^T + bias and s = scale x a^T: the forward, and with the roles of A and B swapped
// dX. w is [E, K, N], or with `transposed` [E, N, K], a [E, r, K], b [E, N, r]; a four-bit w has a
// and b, of rank 0 where there is no adapter.
std::tuple<Tensor, Tensor> product(const Tensor& x, const Tensor& w, bool transposed,
                                   const Quant& quant, int64_t quant_block,
                                   const OptionalTensor& lora_a, const OptionalTensor& lora_b,
                                   const Tensor& scale, const Tensor& offs,
                                   const OptionalTensor& bias) {
  TORCH_CHECK_VALUE(x.dim() == 2, "the rows must be [M, K], got ", x.sizes());
  TORCH_CHECK_VALUE(lora_a.has_value() == lora_b.has_value(), "A and B belong together");
  TORCH_CHECK_VALUE(lora_b ? lora_b->dim() == 3 : !quant && w.dim() == 3,
                    "weight, A and B must be 3-D, and a four-bit weight has A and B");
  const Mixture mixture(offs, x.size(0));
  const int64_t E = mixture.experts, M = x.size(0), K = x.size(1);
  const int64_t N = lora_b ? lora_b->size(1) : w.size(transposed ? 1 : 2);
  const int64_t r = lora_a ? lora_b->size(2) : 0;
  const Weights weights(w, transposed, quant, quant_block, E, K, N);
  Tensor a, b, added;
  if (lora_a) {
    a = stack(*lora_a, "an adapter", x.scalar_type(), E, r, K);
    b = stack(*lora_b, "an adapter", x.scalar_type(), E, N, r);
  }
  if (bias) {
    TORCH_CHECK_VALUE(bias->dim() == 2 && bias->size(0) == E && bias->size(1) == N,
                      "bias must be [", E, ", ", N, "], got ", bias->sizes());
    added = bias->to(at::kFloat).contiguous();
  }
  Tensor y = at::empty({M, N}, x.options());
  const Matrix whole = result(y);
  return with_compute_type(x, [&]<typename C>() {
    Tensor copy;
    const Rows<C> rows = as_rows<C>(x, "the rows", copy);
    Tensor s = at::empty({M, 0}, x.options().dtype(c10::CppTypeToScalarType<C>::value));
    if (r > 0) s = shrunk(mixture, rows, a, factor(scale, 0.0), x.options());
    const Rows<C> tails = {s.const_data_ptr<C>(), M, r, s.size(1)};
    std::vector<Tail<C>> tail(mixture.own.size());
    std::vector<TailedRows<C>> segments(mixture.own.size());
    std::vector<FourBit> bytes(mixture.own.size());
    std::vector<TailProduct<C>> products;
    for (size_t i = 0; i < mixture.own.size(); ++i) {
      const Own& own = mixture.own[i];
      if (r > 0) tail[i] = {rows_of(tails, own), of_expert(b, own.expert).transposed(), 0, nullptr};
      segments[i] = {0, own.rows, &tail[i], 1};
      TailProduct<C> p = {};
      p.x = rows_of(rows, own);
      p.w = weights.matrix(own.expert);
      if (weights.four_bit) {
        bytes[i] = weights.bytes(own.expert);
        p.four_bit = &bytes[i];
      }
      p.segments = &segments[i];
      p.count = r > 0 ? 1 : 0;
      p.bias = bias ? added.const_data_ptr<float>() + own.expert * N : nullptr;
      p.y = rows_of(whole, own);
      products.push_back(p);
    }
    tail_products(products.data(), products.size());
    y.narrow(0, mixture.live, M - mixture.live).zero_();
    return std::make_tuple(y, without_padding(s, r));
  });
}

Tensor expert_shrink(const Tensor& x, const Tensor& lora_a, const Tensor& scale,
                     const Tensor& offs) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(x.dim() == 2 && lora_a.dim() == 3, "x must be [M, K] and lora_a 3-D, got ",
                    x.sizes(), " and ", lora_a.sizes());
  const Mixture mixture(offs, x.size(0));
  const int64_t r = lora_a.size(1);
  const Tensor a = stack(lora_a, "lora_a", x.scalar_type(), mixture.experts, r, x.size(1));
  return with_compute_type(x, [&]<typename C>() {
    Tensor copy;
    const Rows<C> rows = as_rows<C>(x, "x", copy);
    return without_padding(shrunk(mixture, rows, a, factor(scale, 0.0), x.options()), r);
  });
}

std::tuple<Tensor, Tensor> expert_linear_fwd(const Tensor& x, const Tensor& weight,
                                             const OptionalTensor& lora_a,
                                             const OptionalTensor& lora_b, const Tensor& scale,
                                             const Tensor& offs, const OptionalTensor& bias,
                                             bool fan_in_fan_out, const Quant& quant,
                                             int64_t quant_block) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return product(x, weight, !fan_in_fan_out, quant, quant_block, lora_a, lora_b, scale, offs, bias);
}

std::tuple<Tensor, Tensor> expert_linear_dx(const Tensor& dy, const Tensor& weight,
                                            const OptionalTensor& lora_a,
                                            const OptionalTensor& lora_b, const Tensor& scale,
                                            const Tensor& offs, bool fan_in_fan_out,
                                            const Quant& quant, int64_t quant_block) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const auto swapped = [](const OptionalTensor& t) -> OptionalTensor {
    if (!t) return std::nullopt;
    return t->transpose(-1, -2);
  };
  return product(dy, weight, fan_in_fan_out, quant, quant_block, swapped(lora_b), swapped(lora_a),
                 scale, offs, std::nullopt);
}

std::tuple<Tensor, Tensor> expert_linear_dab(const Tensor& dy, const OptionalTensor& x,
                                             const OptionalTensor& s, const OptionalTensor& d,
                                             const Tensor& offs,
                                             std::optional<at::ScalarType> da_dtype,
                                             std::optional<at::ScalarType> db_dtype) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const ConstMatrix dy_rows = matrix(dy, "dy");
  const Mixture mixture(offs, dy_rows.rows);
  TORCH_CHECK_VALUE(!da_dtype || (x && d), "dA needs x and d");
  TORCH_CHECK_VALUE(!db_dtype || s, "dB needs s");
  const auto like_dy = [&](const Tensor& t, const char* name) {
    const ConstMatrix m = matrix(t, name);
    TORCH_CHECK_VALUE(m.rows == dy_rows.rows, name, " must have ", dy_rows.rows, " rows, got ",
                      t.sizes());
    return m;
  };
  Tensor da = at::empty({0}, dy.options()), db = da;
  with_compute_type(dy, [&]<typename C>() {
    std::vector<Reduction<C>> reductions;
    // Of every expert: tail^T rows, into [r, cols].
    const auto add = [&](const ConstMatrix& tail, const ConstMatrix& rows, const Tensor& out,
                         bool transposed) {
      for (const Own& own : mixture.own) {
        const Matrix to = part<void>(out, own.expert, 0, out.size(1), out.size(2));
        reductions.push_back({rows_of(tail, own),
                              rows_of(rows, own),
                              nullptr,
                              transposed ? to.transposed() : to,
                              {}});
      }
    };
    if (da_dtype) {
      const ConstMatrix x_rows = like_dy(*x, "x"), tail = like_dy(*d, "d");
      da = at::zeros({mixture.experts, tail.cols, x_rows.cols}, stored_as(dy, *da_dtype));
      add(tail, x_rows, da, false);
    }
    if (db_dtype) {
      const ConstMatrix tail = like_dy(*s, "s");
      db = at::zeros({mixture.experts, dy_rows.cols, tail.cols}, stored_as(dy, *db_dtype));
      add(tail, dy_rows, db, true);
    }
    reduce(reductions.data(), reductions.size());
  });
  if (da_dtype) da = da.to(*da_dtype);
  if (db_dtype) db = as_stored(db).to(*db_dtype);
  return {da, db};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_kernels_cpu, m) {
  m.def("expert_shrink(Tensor x, Tensor lora_a, Tensor scale, Tensor offs) -> Tensor");
  m.def(
      "expert_linear_fwd(Tensor x, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor scale, "
      "Tensor offs, Tensor? bias=None, bool fan_in_fan_out=False, Tensor[]? quant=None, "
      "int quant_block=0) -> (Tensor, Tensor)");
  m.def(
      "expert_linear_dx(Tensor dy, Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor scale, "
      "Tensor offs, bool fan_in_fan_out=False, Tensor[]? quant=None, int quant_block=0) "
      "-> (Tensor, Tensor)");
  m.def(
      "expert_linear_dab(Tensor dy, Tensor? x, Tensor? s, Tensor? d, Tensor offs, "
      "ScalarType? da_dtype=None, ScalarType? db_dtype=None) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("expert_shrink", &expert_shrink);
  m.impl("expert_linear_fwd", &expert_linear_fwd);
  m.impl("expert_linear_dx", &expert_linear_dx);
  m.impl("expert_linear_dab", &expert_linear_dab);
}

}  // namespace lora_kernels
