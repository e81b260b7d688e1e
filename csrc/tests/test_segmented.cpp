// The kernels of mixed batches against loops of doubles: the schedule, gathered rows, products with
// a tail a segment.
#include "../segmented.h"
#include "support.h"

namespace lora_kernels::tests {

namespace {

void test_schedule(Random& random) {
  constexpr int64_t kBlockRows = 4;
  const int64_t M = random.of({0, 1, 3, 4, 5, 40}), slots = random.of({1, 2, 7});
  const int64_t blocks = (M + kBlockRows - 1) / kBlockRows + std::min(M, slots);
  const auto slot_of_row = exactly<int32_t>(M), rank = exactly<int32_t>(slots);
  const auto order = exactly<int32_t>(M), start = exactly<int32_t>(slots + 1);
  const auto block_slot = exactly<int32_t>(blocks), block_start = exactly<int32_t>(blocks);
  for (int64_t i = 0; i < M; ++i)
    slot_of_row[i] = static_cast<int32_t>(random.below(slots + 1) - 1);
  for (int64_t i = 0; i < slots; ++i) rank[i] = static_cast<int32_t>(random.below(3));
  schedule(M, slots, blocks, kBlockRows, slot_of_row.get(), rank.get(), order.get(), start.get(),
           block_slot.get(), block_start.get());

  const std::string what = text("schedule of ", M, " rows, ", slots, " slots");
  int64_t place = 0, block = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    expect_equal(start[slot], static_cast<double>(place), what + " start", slot, 0);
    const int64_t first = place;
    for (int64_t i = 0; i < M; ++i) {
      if (slot_of_row[i] == slot && rank[slot] > 0) {
        expect_equal(order[place++], static_cast<double>(i), what + " order", slot, i);
      }
    }
    for (int64_t i = first; i < place; i += kBlockRows, ++block) {
      expect_equal(block_slot[block], static_cast<double>(slot), what + " block", block, 0);
      expect_equal(block_start[block], static_cast<double>(i), what + " block", block, 1);
    }
  }
  expect_equal(start[slots], static_cast<double>(place), what + " end", slots, 0);
  for (; block < blocks; ++block) expect_equal(block_slot[block], -1, what + " rest", block, 0);
}

// Some rows of M in any order, none twice.
std::vector<int32_t> some_rows(int64_t M, Random& random) {
  std::vector<int32_t> rows;
  for (int64_t i = 0; i < M; ++i) {
    if (random.below(4) > 0) {
      rows.insert(rows.begin() + random.below(static_cast<int64_t>(rows.size()) + 1),
                  static_cast<int32_t>(i));
    }
  }
  return rows;
}

template <typename C>
void test_gather_rows(Random& random) {
  Values x(random.of({1, 2, 30}), random.of({1, 3, 16, 65, 130}), random);
  const Laid laid(x, random.kind(), random);
  const std::vector<int32_t> rows = some_rows(x.rows, random);
  const int64_t count = static_cast<int64_t>(rows.size());
  const int64_t c0 = random.below(x.cols), c1 = c0 + 1 + random.below(x.cols - c0);
  const auto mask = any_mask(random);
  const auto logical = exactly<int64_t>(count);
  for (int64_t i = 0; i < count; ++i) logical[i] = random.below(1000);
  const int64_t ld = padded<C>(c1 - c0);
  const auto out = exactly<C>(count * ld);
  gather_rows(laid.matrix, rows.data(), count, c0, c1, pointer(mask), logical.get(), out.get(), ld);

  const std::string what = text("gather ", count, " rows, columns ", c0, " to ", c1);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < ld; ++j) {
      const bool live = j < c1 - c0 && (!mask || kept(*mask, logical[i], j));
      expect_equal(static_cast<float>(out[i * ld + j]), live ? x(rows[i], c0 + j) : 0, what, i, j);
    }
  }
}

// A segment with its tails, and what they add up to.
template <typename C>
struct SegmentCase {
  int64_t first, rows;
  std::vector<std::optional<DropoutMask>> masks;
  std::vector<LaidRows<C>> s;
  std::vector<Laid> b;
  std::vector<std::unique_ptr<C[]>> packed;
  std::vector<Tail<C>> tails;
  Values sum;

  SegmentCase(int64_t first, int64_t rows, int64_t N, const std::vector<int64_t>& logical,
              Random& random)
      : first(first), rows(rows), sum(rows, N) {
    std::vector<int64_t> columns;
    for (int64_t c = random.of({1, 2, 3}); c > 0; --c) {
      // Slices side by side, or one on top of the other as in dX.
      const int64_t begin =
          random.coin() ? 0 : random.of({random.below(N), (N - 1) / kPanel * kPanel});
      const int64_t end = random.coin() ? N : begin + 1 + random.below(N - begin);
      const Values tail(rows, random.of({0, 1, 2, 4, 5, 8, 16, 32, 33, 129}), random);
      Values values(tail.cols, end - begin, random);
      columns.push_back(begin);
      masks.push_back(any_mask(random));
      s.emplace_back(tail, padded<C>(tail.cols));
      b.emplace_back(values, random.kind(), random);
      const Values product = times(tail, values);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = begin; j < end; ++j) {
          if (!masks.back() || kept(*masks.back(), logical[first + i], j)) {
            sum(i, j) += product(i, j - begin);
          }
        }
      }
    }
    for (size_t c = 0; c < columns.size(); ++c) {
      packed.push_back(columns[c] % kPanel == 0 ? packed_or_null<C>(b[c].matrix, random) : nullptr);
      tails.push_back({s[c].rows, b[c].matrix, columns[c], pointer(masks[c]), packed.back().get()});
    }
  }
};

// tail_product of rows in another order than y's, some with tails and some without.
template <typename C>
void test_mixed_product(Random& random) {
  const int64_t all = random.of({1, 4, 60, 230, 500}), N = random.of({1, 16, 65, 130, 200});
  const std::vector<int32_t> places = some_rows(all, random);
  const int64_t M = static_cast<int64_t>(places.size());
  const Values x(M, random.of({0, 1, 3, 64, 129, 300}), random);
  Values w(x.cols, N, random);
  const Laid laid_w(w, random.kind(), random);
  const LaidRows<C> rows(x, padded<C>(x.cols));
  const auto packed = packed_or_null<C>(laid_w.matrix, random);
  const auto bias = random.coin() ? exactly<float>(N) : nullptr;
  for (int64_t j = 0; bias && j < N; ++j) bias[j] = static_cast<float>(random.below(100)) / 4;
  std::vector<int64_t> logical;
  for (int64_t i = 0; i < M; ++i) logical.push_back(random.below(1000));

  std::vector<SegmentCase<C>> cases;
  for (int64_t first = 0; first < M;) {
    const int64_t most = random.of({1, 4, 100, M}), count = std::min(M - first, most);
    if (random.below(4) > 0) cases.emplace_back(first, count, N, logical, random);
    first += count;
  }
  std::vector<TailedRows<C>> segments;
  for (const auto& one : cases) {
    segments.push_back(
        {one.first, one.rows, one.tails.data(), static_cast<int64_t>(one.tails.size())});
  }
  const bool add = random.coin(), beside = random.below(4) > 0;
  Values before(all, N, random);
  const Laid y = Laid::with_strides(before, random.coin() ? kind_of<C> : random.kind(),
                                    beside ? N + random.of({0, 3}) : 1, beside ? 1 : all);
  tail_product<C>({rows.rows, laid_w.matrix, packed.get(), segments.data(),
                   static_cast<int64_t>(segments.size()), places.data(), logical.data(), nullptr,
                   bias.get(), y.matrix, add});

  Values expected = before, sums = times(x, w);
  for (const auto& one : cases) {
    for (int64_t i = 0; i < one.rows; ++i) {
      for (int64_t j = 0; j < N; ++j) sums(one.first + i, j) += one.sum(i, j);
    }
  }
  for (int64_t i = 0; i < M; ++i) {
    for (int64_t j = 0; j < N; ++j) {
      const double base = add ? before(places[i], j) : 0;
      expected(places[i], j) = base + sums(i, j) + (bias ? static_cast<double>(bias[j]) : 0);
    }
  }
  expect(y.matrix, expected,
         text("mixed product ", M, " of ", all, "x", x.cols, "x", N, add ? " added" : ""));
}

}  // namespace

template <typename C>
void test_segmented() {
  cases(100, test_schedule);
  cases(100, test_gather_rows<C>);
  cases(150, test_mixed_product<C>);
}

template void test_segmented<float>();
template void test_segmented<BFloat16>();

}  // namespace lora_kernels::tests
