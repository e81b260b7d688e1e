// The kernels of the layer against their formulas in plain loops.
#include "support.h"

namespace lora_kernels::tests {

namespace {

Values transposed(const Values& a) {
  Values t(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) t(j, i) = a(i, j);
  }
  return t;
}

template <typename C>
void test_shrink(Random& random) {
  Values x(random.of({1, 2, 5, 12, 31, 32, 33, 49, 97, 150}),
           random.of({0, 1, 2, 3, 4, 8, 15, 16, 17, 64, 127, 128, 129, 300, 513}), random);
  Values a(random.of({1, 2, 3, 4, 7, 8, 15, 16, 17, 32, 33, 64, 65, 130}), x.cols, random);
  const Laid laid(a, random.kind(), random);
  const auto mask = any_mask(random);
  const int64_t M = x.rows, r = a.rows, ld = padded<C>(r);
  const std::string what = text("shrink ", M, "x", x.cols, " rank ", r, mask ? " masked" : "");
  const LaidRows<C> rows(x, padded<C>(x.cols) + random.of({0, 2, 6}));
  const Laid s(M, r, kind_of<C>, r, 1);
  const auto s_rows = random.coin() ? exactly<C>(M * ld) : nullptr;
  const auto scales = random.coin() ? exactly<float>(r) : nullptr;
  for (int64_t j = 0; scales && j < r; ++j) scales[j] = static_cast<float>(random.of({1, 2, -4}));
  const auto packed = packed_or_null<C>(laid.matrix.transposed(), random);
  const Shrink<C> job = {rows.rows, laid.matrix,  0.5f,         pointer(mask), s.matrix,
                         nullptr,   s_rows.get(), scales.get(), packed.get()};
  shrink(&job, 1);

  drop_values(x, mask);
  Values expected = times(x, transposed(a));
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < r; ++j) expected(i, j) *= scales ? scales[j] : 0.5;
  }
  expect(s.matrix, expected, what);
  for (int64_t i = 0; s_rows && i < M; ++i) {
    for (int64_t j = 0; j < ld; ++j) {
      const double value = j < r ? rounded(element(s.matrix, i, j), kind_of<C>) : 0;
      expect_equal(static_cast<float>(s_rows[i * ld + j]), value, what + " s_rows", i, j);
    }
  }
}

// One product with its operands and what it should give.
template <typename C>
struct ProductCase {
  std::string what;
  std::optional<DropoutMask> mask;
  std::unique_ptr<float[]> scales, bias;
  std::unique_ptr<C[]> packed, packed_b, packed_other;
  std::optional<Laid> w, b, y, w_other;
  std::optional<LaidRows<C>> rows, tail, rows_other;
  Factors<C> other;
  Tail<C> own;
  TailedRows<C> all;
  TailProduct<C> product;
  Values expected{0, 0};

  explicit ProductCase(Random& random) {
    const Values x(random.of({0, 1, 2, 5, 12, 25, 49, 100, 193}),
                   random.of({0, 1, 2, 3, 17, 64, 127, 129, 300}), random);
    Values weight(x.cols, random.of({1, 7, 16, 17, 33, 63, 64, 65, 129, 200}), random);
    const int64_t M = x.rows, N = weight.cols;
    const Values s(M, random.of({0, 1, 2, 3, 4, 8, 16, 17, 32, 64, 130}), random);
    Values adapter(s.cols, N, random);
    w.emplace(weight, random.kind(), random);
    b.emplace(adapter, random.kind(), random);
    mask = any_mask(random);
    what = text("tail_product ", M, "x", x.cols, "x", N, " rank ", s.cols, mask ? " masked" : "");

    if (random.coin()) scales = exactly<float>(N);
    if (random.coin()) bias = exactly<float>(N);
    for (int64_t j = 0; j < N; ++j) {
      if (scales) scales[j] = static_cast<float>(random.of({1, 2, -4}));
      if (bias) bias[j] = static_cast<float>(random.below(100)) / 4;
    }
    packed = packed_or_null<C>(w->matrix, random);
    packed_b = packed_or_null<C>(b->matrix, random);
    rows.emplace(x, padded<C>(x.cols) + random.of({0, 2}));
    tail.emplace(s, padded<C>(s.cols) + random.of({0, 2}));
    y.emplace(M, N, random.kind(), N, 1);
    own = {tail->rows, b->matrix, 0, pointer(mask), packed_b.get()};
    all = {0, M, &own, 1};
    product = {rows->rows, w->matrix,    packed.get(), &all,      1,    nullptr,
               nullptr,    scales.get(), bias.get(),   y->matrix, false};

    expected = times(s, adapter);
    drop_values(expected, mask);
    Values base = times(x, weight);
    if (random.coin()) add_another(base, random);
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        expected(i, j) = (expected(i, j) + base(i, j)) * (scales ? scales[j] : 1) +
                         (bias ? static_cast<double>(bias[j]) : 0);
      }
    }
  }

  ProductCase(const ProductCase&) = delete;

 private:
  // A product of other rows and another weight, which is added to the first.
  void add_another(Values& base, Random& random) {
    const Values x(base.rows, random.of({1, 2, 17, 128, 129, 300}), random);
    Values weight(x.cols, base.cols, random);
    w_other.emplace(weight, random.kind(), random);
    rows_other.emplace(x, padded<C>(x.cols) + random.of({0, 2}));
    packed_other = packed_or_null<C>(w_other->matrix, random);
    other = {rows_other->rows, w_other->matrix, packed_other.get()};
    product.others = &other;
    product.other_count = 1;
    const Values added = times(x, weight);
    for (size_t i = 0; i < base.data.size(); ++i) base.data[i] += added.data[i];
    what += text(" and x", x.cols);
  }
};

template <typename C>
void test_tail_products(Random& random) {
  std::vector<std::unique_ptr<ProductCase<C>>> cases;
  std::vector<TailProduct<C>> products;
  for (int64_t i = random.of({1, 1, 2, 5}); i > 0; --i) {
    cases.push_back(std::make_unique<ProductCase<C>>(random));
    products.push_back(cases.back()->product);
  }
  tail_products(products.data(), products.size());
  for (const auto& one : cases) expect(one->y->matrix, one->expected, one->what);
}

// One reduction with its operands and what it should give.
template <typename C>
struct ReductionCase {
  std::string what;
  std::optional<DropoutMask> mask;
  std::optional<Laid> x, tail, out, sums;
  Values expected{0, 0}, expected_sums{0, 0};

  explicit ReductionCase(Random& random) : mask(any_mask(random)) {
    Values values(random.of({0, 1, 2, 3, 31, 127, 128, 129, 300}),
                  random.of({1, 7, 16, 17, 63, 64, 65, 130}), random);
    Values tails(values.rows, random.of({1, 2, 3, 4, 8, 16, 17, 32, 64, 130}), random);
    x.emplace(values, random.kind(), random);
    tail.emplace(tails, random.kind(), random);
    const int64_t K = values.cols, r = tails.cols;
    const bool with_out = random.below(4) > 0;
    if (with_out) {
      const bool columns = random.coin();
      out.emplace(r, K, random.kind(), columns ? 1 : K, columns ? r : 1);
    }
    if (!with_out || random.coin()) sums.emplace(1, K, random.kind(), K, 1);
    what = text("reduce ", values.rows, "x", K, " rank ", r, mask ? " masked" : "",
                out ? "" : " no out", sums ? " sums" : "");
    drop_values(values, mask);
    expected = times(transposed(tails), values);
    Values ones(1, values.rows);
    for (double& value : ones.data) value = 1;
    expected_sums = times(ones, values);
  }

  Reduction<C> reduction() const {
    return {tail->matrix, x->matrix, pointer(mask), out ? out->matrix : Matrix{},
            sums ? sums->matrix : Matrix{}};
  }
};

template <typename C>
void test_reduce(Random& random) {
  std::vector<ReductionCase<C>> several;
  std::vector<Reduction<C>> reductions;
  for (int64_t i = random.below(3); i >= 0; --i) several.emplace_back(random);
  for (const auto& one : several) reductions.push_back(one.reduction());
  reduce(reductions.data(), static_cast<int64_t>(reductions.size()));
  for (const auto& one : several) {
    if (one.out) expect(one.out->matrix, one.expected, one.what);
    if (one.sums) expect(one.sums->matrix, one.expected_sums, one.what + " sums");
  }
}

}  // namespace

template <typename C>
void test_linear() {
  cases(150, test_shrink<C>);
  cases(100, test_tail_products<C>);
  cases(150, test_reduce<C>);
}

template void test_linear<float>();
template void test_linear<BFloat16>();

}  // namespace lora_kernels::tests
