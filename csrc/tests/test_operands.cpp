// What products are made of: panels, copies of rows, masks, and the product itself.
#include <cstring>

#include "../product.h"
#include "support.h"

namespace lora_kernels::tests {

namespace {

template <typename C>
void expect_panel(const C* panel, const Values& b, int64_t k0, int64_t k1, int64_t n0,
                  const std::string& what) {
  const int64_t width = panel_width(b.cols - n0), depth = padded<C>(k1 - k0);
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t n = 0; n < width; ++n) {
      const C held = panel[place<C>(k, n, depth, width)];
      const bool inside = k < k1 - k0 && n0 + n < b.cols;
      expect_equal(static_cast<float>(held), inside ? b(k0 + k, n0 + n) : 0, what, k, n);
    }
  }
}

template <typename C>
void test_pack(Random& random) {
  Values values(random.of({1, 2, 3, 7, 15, 16, 17, 31, 33, 64, 65, 127, 129, 300, 513}),
                random.of({1, 2, 7, 15, 16, 17, 33, 48, 63, 64, 65, 100, 129, 200}), random);
  const Laid b(values, random.kind(), random);
  const Matrix& m = b.matrix;
  const std::string what = text("pack ", m.rows, "x", m.cols, " kind ", int(m.kind), " strides ",
                                m.stride_row, ", ", m.stride_col);

  const int64_t k0 = random.below(m.rows) / 2 * 2, n0 = random.below(panels(m.cols)) * kPanel;
  const int64_t k1 = random.coin() ? m.rows : std::min(m.rows, k0 + 2 + random.below(40) * 2);
  const auto panel = exactly<C>(padded<C>(k1 - k0) * panel_width(m.cols - n0));
  pack_panel(m, k0, k1, n0, panel.get());
  expect_panel(panel.get(), values, k0, k1, n0, what);

  const auto packed = exactly<C>(packed_size<C>(m.rows, m.cols));
  pack(m, packed.get());
  for (int64_t n = 0; n < m.cols; n += kPanel) {
    for (int64_t k = 0; k < m.rows; k += kPart<C>) {
      const C* part = packed.get() + n * padded<C>(m.rows) + k * panel_width(m.cols - n);
      expect_panel(part, values, k, std::min(m.rows, k + kPart<C>), n, what);
    }
  }
  expect_equal(is_packed(m, packed.get()), true, what, 0, 0);
  for (int64_t i = 0; i < packed_size<C>(m.rows, m.cols); ++i) packed[i] = C(7.0f);
  expect_equal(is_packed(m, packed.get()), false, what, 0, 0);
}

template <typename C>
void test_copy_rows(Random& random) {
  Values values(random.of({1, 2, 7, 15, 16, 17, 33, 70}), random.of({1, 2, 7, 16, 17, 33, 64, 131}),
                random);
  const Laid x(values, random.kind(), random);
  const Matrix& m = x.matrix;
  const std::string what = text("copy_rows ", m.rows, "x", m.cols, " kind ", int(m.kind),
                                " strides ", m.stride_row, ", ", m.stride_col);
  const int64_t i0 = random.below(m.rows), i1 = i0 + 1 + random.below(m.rows - i0);
  const int64_t k0 = random.below(m.cols), k1 = k0 + 1 + random.below(m.cols - k0);
  const int64_t ld = padded<C>(k1 - k0) + random.of({0, 0, 2, 70});
  const auto out = exactly<C>((i1 - i0) * ld);
  copy_rows(m, i0, i1, k0, k1, out.get(), ld);
  for (int64_t i = 0; i < i1 - i0; ++i) {
    for (int64_t k = 0; k < ld; ++k) {
      const double expected = k < k1 - k0 ? values(i0 + i, k0 + k) : 0;
      expect_equal(static_cast<float>(out[i * ld + k]), expected, what, i, k);
    }
  }

  const int64_t all_ld = padded<C>(m.cols);
  const auto all = exactly<C>(m.rows * all_ld);
  copy_all_rows(m, all.get(), all_ld);
  expect(Matrix{all.get(), kind_of<C>, m.rows, m.cols, all_ld, 1}, values, what);
}

// Every way to pack and to copy, at the sizes where one ends and the next begins: whole vectors,
// the halves and quarters of one that usual ranks fill, and odd ends.
template <typename C>
void test_every_short_size() {
  Random random(0);
  for (int64_t K = 1; K <= 40; ++K) {
    for (const int64_t N :
         {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 68}) {
      for (const Kind kind : {Kind::kFloat, Kind::kBFloat16, Kind::kHalf}) {
        const Values values(K, N, random);
        for (const bool columns : {false, true}) {
          const Laid b =
              Laid::with_strides(values, kind, columns ? 1 : N, columns ? K : int64_t{1});
          const std::string what =
              text(columns ? "columns " : "rows ", K, "x", N, " kind ", int(kind));
          const auto panels = exactly<C>(packed_size<C>(K, N));
          for (int64_t n = 0; n < N; n += kPanel) {
            C* panel = panels.get() + n * padded<C>(K);
            pack_panel(b.matrix, 0, K, n, panel);
            expect_panel(panel, values, 0, K, n, "pack " + what);
          }
          const int64_t ld = padded<C>(N);
          const auto out = exactly<C>(K * ld);
          copy_rows(b.matrix, 0, K, 0, N, out.get(), ld);
          expect(Matrix{out.get(), kind_of<C>, K, N, ld, 1}, values, "copy " + what);
        }
      }
    }
  }
}

template <typename C>
void test_product(Random& random) {
  const int64_t M = random.of({1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 23, 24, 25, 50});
  // Of a panel of `depth` rows those from `first` on.
  const int64_t depth = padded<C>(1 + random.below(kPart<C> - 1)),
                width = random.of({16, 32, 48, 64});
  const int64_t first = random.coin() ? 0 : random.below(depth / 2 + 1) / 2 * 2, K = depth - first;
  const bool halves = first == 0 && random.coin(), add = !halves && random.coin();
  const std::string what = text("product ", M, "x", K, "x", width, " from row ", first,
                                halves ? " in halves"
                                : add  ? " added"
                                       : "");
  const Values a(M, K, random);
  Values b(depth, width, random);
  const LaidRows<C> rows(a, K + random.of({0, 2, 32}));
  const Laid columns = Laid::contiguous(b, kind_of<C>);
  const auto panel = exactly<C>(depth * width);
  pack_panel(columns.matrix, 0, depth, 0, panel.get());

  const auto c = exactly<float>((M - 1) * kPanel + width);
  std::fill(c.get(), c.get() + (M - 1) * kPanel + width, 3.0f);
  if (halves) {
    product_in_halves(M, width, K, rows.rows.data, rows.rows.ld, panel.get(), c.get());
  } else {
    product(M, width, K, depth, rows.rows.data, rows.rows.ld,
            panel.get() + first * std::min<int64_t>(width, kStrip), c.get(), add);
  }
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < (i + 1 < M ? kPanel : width); ++j) {
      double expected = j < width && !add ? 0 : 3;
      for (int64_t k = 0; j < width && k < K; ++k) expected += a(i, k) * b(first + k, j);
      expect_equal(c[i * kPanel + j], expected, what, i, j);
    }
  }
  release_products();
}

template <typename Bits>
void test_masks(Random& random) {
  const int64_t M = random.of({1, 2, 5, 40}), K = random.of({1, 2, 7, 8, 9, 63, 64, 65, 255, 300});
  const int64_t stride_row = random.of({0, 1, K, 2 * K + 1}), stride_col = random.of({0, 1, 2});
  const DropoutMask mask = {0x0123456789ABCDEFull, 0xFEDCBA9876543210ull, random.below(1000),
                            random.below(1000), dropout_threshold(0.4)};
  const std::string what = text("masked ", M, "x", K, " of ", sizeof(Bits), " bytes");
  const int64_t size = (M - 1) * stride_row + (K - 1) * stride_col + 1;
  const auto x = exactly<Bits>(size), out = exactly<Bits>(M * K);
  for (int64_t i = 0; i < size; ++i) x[i] = static_cast<Bits>(i + 1);
  masked(x.get(), out.get(), M, K, stride_row, stride_col, mask);
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < K; ++j) {
      const auto value = static_cast<Bits>(i * stride_row + j * stride_col + 1);
      expect_equal(out[i * K + j], kept(mask, i, j) ? value : 0, what, i, j);
    }
  }

  if constexpr (sizeof(Bits) < 8) {
    const int64_t ld = K + random.of({0, 3}), row = random.below(50), col = random.below(50);
    const auto block = exactly<Bits>((M - 1) * ld + K);
    std::fill(block.get(), block.get() + (M - 1) * ld + K, Bits{9});
    drop(block.get(), M, K, ld, row, col, mask);
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < (i + 1 < M ? ld : K); ++j) {
        const bool dropped = j < K && !kept(mask, row + i, col + j);
        expect_equal(block[i * ld + j], dropped ? 0 : 9, what, i, j);
      }
    }
  }
}

}  // namespace

template <typename C>
void test_operands() {
  test_every_short_size<C>();
  cases(300, test_pack<C>);
  cases(300, test_copy_rows<C>);
  cases(200, test_product<C>);
}

void test_dropout() {
  cases(60, test_masks<uint16_t>);
  cases(60, test_masks<uint32_t>);
  cases(60, test_masks<uint64_t>);
}

template void test_operands<float>();
template void test_operands<BFloat16>();

}  // namespace lora_kernels::tests
