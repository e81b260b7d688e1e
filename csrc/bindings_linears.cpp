// The boundary of the operators of projections that share an input: one pass over x for all of
// their adapters, and one sum for dX.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/List.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "bindings.h"
#include "linear.h"

namespace lora_kernels {

namespace {

using at::TensorList;
using Biases = c10::List<OptionalTensor>;

// What the operators of several projections take besides their rows.
struct Projections {
  std::vector<Tensor> weights, a, b;  // weights as [K, N_j]
  std::vector<float> scales;
  std::vector<int64_t> first;  // where those of S and D begin, and where the last ends
  int64_t K;

  Projections(TensorList weights_given, TensorList lora_a, TensorList lora_b,
              TensorList scales_given, at::ScalarType rows, double dropout_p, bool fan_in_fan_out)
      : first(1, 0) {
    check_dropout_p(dropout_p);
    const size_t n = weights_given.size();
    TORCH_CHECK_VALUE(n > 0 && lora_a.size() == n && lora_b.size() == n && scales_given.size() == n,
                      "the lists must have one length, at least 1");
    TORCH_CHECK_VALUE(lora_a[0].dim() == 2, "lora_a must be [r, K], got ", lora_a[0].sizes());
    K = lora_a[0].size(1);
    for (size_t j = 0; j < n; ++j) {
      TORCH_CHECK_VALUE(lora_a[j].dim() == 2 && lora_b[j].dim() == 2,
                        "lora_a and lora_b must have two dimensions");
      const int64_t r = lora_a[j].size(0), N = lora_b[j].size(0);
      check_shape(lora_a[j], "lora_a", r, K);
      check_shape(lora_b[j], "lora_b", N, r);
      check_shape(weights_given[j], "weight", fan_in_fan_out ? K : N, fan_in_fan_out ? N : K);
      TORCH_CHECK_TYPE(weights_given[j].scalar_type() == rows, "the rows are ", rows,
                       " and a weight is ", weights_given[j].scalar_type());
      weights.push_back(fan_in_fan_out ? weights_given[j] : weights_given[j].t());
      a.push_back(adapter(lora_a[j], rows));
      b.push_back(adapter(lora_b[j], rows));
      scales.push_back(factor(scales_given[j], dropout_p));
      first.push_back(first.back() + r);
    }
  }

  size_t count() const { return a.size(); }
  int64_t ranks() const { return first.back(); }

  // A of all projections one over the other, [sum r_j, K]. Little beside x.
  Tensor stacked_a() const {
    if (count() == 1) return a[0];
    for (const Tensor& t : a) {
      if (t.scalar_type() != a[0].scalar_type()) {
        std::vector<Tensor> same;
        for (const Tensor& own : a) same.push_back(own.to(at::kFloat));
        return at::cat(same);
      }
    }
    return at::cat(a);
  }

  // The scale of every column of S.
  std::vector<float> column_scales() const {
    std::vector<float> found;
    for (size_t j = 0; j < count(); ++j)
      found.insert(found.end(), first[j + 1] - first[j], scales[j]);
    return found;
  }

  Tensor columns(const Tensor& s, size_t j) const {
    return s.narrow(1, first[j], first[j + 1] - first[j]);
  }
};

// Projection j draws with the offset + j.
std::optional<DropoutMask> mask_of(const std::optional<DropoutMask>& mask, size_t j) {
  std::optional<DropoutMask> own = mask;
  if (own) own->offset += j;
  return own;
}

template <typename C>
const C* panels_of_list(const std::optional<TensorList>& packed, size_t j, int64_t K, int64_t N) {
  return packed ? panels_of<C>(OptionalTensor((*packed)[j]), K, N) : nullptr;
}

template <typename C>
at::TensorOptions tail_options(const Tensor& rows) {
  return rows.options().dtype(c10::CppTypeToScalarType<C>::value);
}

std::tuple<std::vector<Tensor>, Tensor> lora_linears_fwd(const Tensor& x, TensorList weights,
                                                         TensorList lora_a, TensorList lora_b,
                                                         TensorList scales, const Biases& biases,
                                                         const OptionalTensor& rng,
                                                         double dropout_p, bool fan_in_fan_out,
                                                         const std::optional<TensorList>& packed) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(x.dim() == 2, "x must be [M, K], got ", x.sizes());
  const Projections of(weights, lora_a, lora_b, scales, x.scalar_type(), dropout_p, fan_in_fan_out);
  check_shape(x, "x", x.size(0), of.K);
  TORCH_CHECK_VALUE(biases.size() == of.count() && (!packed || packed->size() == of.count()),
                    "biases and packed must be as many as the weights");
  const auto mask = dropout_mask(rng, dropout_p);
  const int64_t M = x.size(0);
  return with_compute_type(x, [&]<typename C>() {
    Tensor copy;
    const Rows<C> rows = as_rows<C>(x, "x", copy);
    Tensor s = at::empty({M, of.ranks()}, tail_options<C>(x));
    if (M > 0 && !mask) {
      const Tensor a = of.stacked_a();
      const std::vector<float> factors = of.column_scales();
      const Shrink<C> job = {rows,    matrix(a, "lora_a"), 0.0f, nullptr, result(s), nullptr,
                             nullptr, factors.data()};
      shrink(&job, 1);
    } else if (M > 0) {
      // Every projection has a mask of its own.
      std::vector<DropoutMask> masks;
      std::vector<Shrink<C>> jobs;
      for (size_t j = 0; j < of.count(); ++j) masks.push_back(*mask_of(mask, j));
      for (size_t j = 0; j < of.count(); ++j) {
        jobs.push_back({rows, matrix(of.a[j], "lora_a"), of.scales[j], &masks[j],
                        result(of.columns(s, j)), nullptr, nullptr});
      }
      shrink(jobs.data(), static_cast<int64_t>(jobs.size()));
    }

    const size_t n = of.count();
    std::vector<Tensor> ys, copies(n);
    std::vector<OptionalTensor> vectors(n);
    std::vector<Tail<C>> tails(n);
    std::vector<TailedRows<C>> all(n);
    std::vector<TailProduct<C>> products;
    for (size_t j = 0; j < n; ++j) {
      const int64_t N = of.weights[j].size(1);
      vectors[j] = vector(biases.get(j), "bias", N);
      ys.push_back(at::empty({M, N}, x.options()));
      tails[j] = {as_rows<C>(of.columns(s, j), "S", copies[j]),
                  matrix(of.b[j], "lora_b").transposed(), 0, nullptr};
      all[j] = {0, M, &tails[j], 1};
      products.push_back({rows, matrix(of.weights[j], "weight"),
                          panels_of_list<C>(packed, j, of.K, N), &all[j], 1, nullptr, nullptr,
                          nullptr, pointer(vectors[j]), result(ys[j]), false});
    }
    tail_products(products.data(), static_cast<int64_t>(n));
    return std::make_tuple(ys, s);
  });
}

std::tuple<Tensor, Tensor> lora_linears_dx(TensorList dy, TensorList weights, TensorList lora_a,
                                           TensorList lora_b, TensorList scales,
                                           const OptionalTensor& rng, double dropout_p,
                                           bool fan_in_fan_out,
                                           const std::optional<TensorList>& packed) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(
      !dy.empty() && dy.size() == weights.size() && (!packed || packed->size() == dy.size()),
      "dy, weights and packed must have one length, at least 1");
  const auto dtype = dy[0].scalar_type();
  const Projections of(weights, lora_a, lora_b, scales, dtype, dropout_p, fan_in_fan_out);
  const int64_t M = dy[0].dim() == 2 ? dy[0].size(0) : -1;
  for (size_t j = 0; j < dy.size(); ++j) {
    check_shape(dy[j], "dy", M, of.weights[j].size(1));
    TORCH_CHECK_TYPE(dy[j].scalar_type() == dtype, "the gradients differ in dtype");
  }
  const auto mask = dropout_mask(rng, dropout_p);
  return with_compute_type(dy[0], [&]<typename C>() {
    const size_t n = of.count();
    std::vector<Tensor> copies(n);
    std::vector<Factors<C>> factors;
    std::vector<Shrink<C>> jobs;
    Tensor d = at::empty({M, of.ranks()}, tail_options<C>(dy[0]));
    Tensor dx = at::empty({M, of.K}, dy[0].options());
    if (M == 0) return std::make_tuple(dx, d);
    for (size_t j = 0; j < n; ++j) {
      const Rows<C> rows = as_rows<C>(dy[j], "dy", copies[j]);
      const ConstMatrix w = matrix(of.weights[j], "weight").transposed();
      factors.push_back({rows, w, panels_of_list<C>(packed, j, w.rows, of.K)});
      jobs.push_back({rows, matrix(of.b[j], "lora_b").transposed(), of.scales[j], nullptr,
                      result(of.columns(d, j)), nullptr, nullptr});
    }
    shrink(jobs.data(), static_cast<int64_t>(n));

    // Without masks D A is one product.
    const Tensor a = mask ? Tensor() : of.stacked_a();
    std::vector<Tensor> d_copies(n);
    std::vector<DropoutMask> masks;
    for (size_t j = 0; mask && j < n; ++j) masks.push_back(*mask_of(mask, j));
    std::vector<Tail<C>> tails;
    if (!mask) {
      tails.push_back({as_rows<C>(d, "D", d_copies[0]), matrix(a, "lora_a"), 0, nullptr});
    }
    for (size_t j = 0; mask && j < n; ++j) {
      tails.push_back({as_rows<C>(of.columns(d, j), "D", d_copies[j]), matrix(of.a[j], "lora_a"), 0,
                       &masks[j]});
    }
    const TailedRows<C> all = {0, M, tails.data(), static_cast<int64_t>(tails.size())};
    TailProduct<C> p = {};
    p.x = factors[0].x;
    p.w = factors[0].w;
    p.packed = factors[0].packed;
    p.segments = &all;
    p.count = 1;
    p.y = result(dx);
    p.others = factors.data() + 1;
    p.other_count = static_cast<int64_t>(n) - 1;
    tail_product(p);
    return std::make_tuple(dx, d);
  });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> lora_linears_dab(
    TensorList dy, const OptionalTensor& x, const OptionalTensor& s, const OptionalTensor& d,
    at::IntArrayRef ranks, const OptionalTensor& rng, double dropout_p,
    std::optional<at::ScalarType> da_dtype, std::optional<at::ScalarType> db_dtype,
    std::optional<at::ScalarType> dbias_dtype) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(!dy.empty() && dy.size() == ranks.size(),
                    "dy and ranks must have one length, at least 1");
  const size_t n = dy.size();
  const int64_t M = matrix(dy[0], "dy").rows;
  int64_t R = 0;
  for (const int64_t r : ranks) R += r;
  const auto mask = dropout_mask(rng, dropout_p);
  TORCH_CHECK_VALUE(!da_dtype || (x && d), "dA needs x and d");
  TORCH_CHECK_VALUE(!db_dtype || s, "dB needs s");
  if (da_dtype) check_shape(*x, "x", M, x->size(1));
  if (da_dtype) check_shape(*d, "d", M, R);
  if (db_dtype) check_shape(*s, "s", M, R);

  std::vector<Tensor> da, db, dbias;
  with_compute_type(dy[0], [&]<typename C>() {
    std::vector<DropoutMask> masks;
    for (size_t j = 0; mask && j < n; ++j) masks.push_back(*mask_of(mask, j));
    std::vector<Reduction<C>> reductions;
    Tensor stacked;
    if (da_dtype && !mask) {
      // x is read once for all of them.
      stacked = at::empty({R, x->size(1)}, stored_as(dy[0], *da_dtype));
      reductions.push_back({matrix(*d, "d"), matrix(*x, "x"), nullptr, result(stacked), {}});
    }
    int64_t first = 0;
    for (size_t j = 0; j < n; first += ranks[j], ++j) {
      const ConstMatrix rows = matrix(dy[j], "dy");
      TORCH_CHECK_VALUE(rows.rows == M, "the gradients differ in rows");
      if (da_dtype && mask) {
        da.push_back(at::empty({ranks[j], x->size(1)}, stored_as(dy[0], *da_dtype)));
        const Tensor own = d->narrow(1, first, ranks[j]);
        reductions.push_back({matrix(own, "d"), matrix(*x, "x"), &masks[j], result(da.back()), {}});
      }
      Matrix sums = {};
      if (dbias_dtype) {
        dbias.push_back(at::empty({rows.cols}, stored_as(dy[0], *dbias_dtype)));
        sums = result(dbias.back().unsqueeze(0));
      }
      if (db_dtype) {
        db.push_back(at::empty({rows.cols, ranks[j]}, stored_as(dy[0], *db_dtype)));
        const Tensor own = s->narrow(1, first, ranks[j]);
        reductions.push_back(
            {matrix(own, "s"), rows, nullptr, result(db.back()).transposed(), sums});
      } else if (dbias_dtype) {
        reductions.push_back({{}, rows, nullptr, {}, sums});
      }
    }
    reduce(reductions.data(), static_cast<int64_t>(reductions.size()));
    // Results of an operator share no memory.
    first = 0;
    for (size_t j = 0; stacked.defined() && j < n; first += ranks[j], ++j) {
      da.push_back(stacked.narrow(0, first, ranks[j]).clone());
    }
  });
  const auto cast = [](std::vector<Tensor>& gradients, std::optional<at::ScalarType> dtype) {
    for (Tensor& t : gradients) t = t.to(*dtype);
  };
  cast(da, da_dtype);
  cast(db, db_dtype);
  cast(dbias, dbias_dtype);
  return {da, db, dbias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_kernels_cpu, m) {
  m.def(
      "lora_linears_fwd(Tensor x, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor[] scales, Tensor?[] biases, Tensor? rng=None, float dropout_p=0.0, "
      "bool fan_in_fan_out=False, Tensor[]? packed=None) -> (Tensor[], Tensor)");
  m.def(
      "lora_linears_dx(Tensor[] dy, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor[] scales, Tensor? rng=None, float dropout_p=0.0, bool fan_in_fan_out=False, "
      "Tensor[]? packed=None) -> (Tensor, Tensor)");
  m.def(
      "lora_linears_dab(Tensor[] dy, Tensor? x, Tensor? s, Tensor? d, int[] ranks, "
      "Tensor? rng=None, float dropout_p=0.0, ScalarType? da_dtype=None, "
      "ScalarType? db_dtype=None, ScalarType? dbias_dtype=None) "
      "-> (Tensor[], Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("lora_linears_fwd", &lora_linears_fwd);
  m.impl("lora_linears_dx", &lora_linears_dx);
  m.impl("lora_linears_dab", &lora_linears_dab);
}

}  // namespace lora_kernels
