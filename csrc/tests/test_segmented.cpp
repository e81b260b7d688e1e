// The kernels of mixed batches against loops of doubles: the schedule, gathered rows, the expand.
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

// One segment with what it adds to which rows of y.
template <typename C>
struct ExpandCase {
  std::vector<int32_t> rows;
  std::vector<int64_t> logical;
  std::vector<std::optional<DropoutMask>> masks;
  std::vector<LaidRows<C>> s;
  std::vector<Laid> b;
  std::vector<Contribution<C>> contributions;
  Values sum;

  ExpandCase(std::vector<int32_t> given, int64_t N, Random& random)
      : rows(std::move(given)), sum(static_cast<int64_t>(rows.size()), N) {
    const int64_t M = sum.rows, count = random.of({1, 3});
    for (int64_t i = 0; i < M; ++i) logical.push_back(random.below(1000));
    for (int64_t c = 0; c < count; ++c) {
      const Values tail(M, random.of({1, 2, 5, 16, 33, 129}), random);
      Values columns(tail.cols, N, random);
      masks.push_back(any_mask(random));
      s.emplace_back(tail, padded<C>(tail.cols));
      b.emplace_back(columns, random.kind(), random);
      const Values product = times(tail, columns);
      for (int64_t i = 0; i < M; ++i) {
        for (int64_t j = 0; j < N; ++j) {
          const bool live = !masks[c] || kept(*masks[c], logical[i], j);
          if (live) sum(i, j) += product(i, j);
        }
      }
    }
    for (int64_t c = 0; c < count; ++c) {
      contributions.push_back({s[c].rows, b[c].matrix, pointer(masks[c])});
    }
  }
};

template <typename C>
void test_expand(Random& random) {
  const int64_t M = random.of({1, 4, 60, 230}), N = random.of({1, 16, 65, 130});
  const bool add = random.coin();
  Values before(M, N, random);
  const Laid y = Laid::contiguous(before, random.coin() ? kind_of<C> : Kind::kFloat);
  std::vector<int32_t> rows = some_rows(M, random);
  const auto half = rows.begin() + static_cast<int64_t>(rows.size() / 2);
  std::vector<ExpandCase<C>> cases;
  cases.reserve(2);
  cases.emplace_back(std::vector<int32_t>(rows.begin(), half), N, random);
  cases.emplace_back(std::vector<int32_t>(half, rows.end()), N, random);
  std::vector<Expand<C>> jobs;
  for (const auto& one : cases) {
    jobs.push_back({one.contributions.data(), static_cast<int64_t>(one.contributions.size()),
                    one.rows.data(), one.logical.data(), y.matrix, add});
  }
  expand(jobs.data(), static_cast<int64_t>(jobs.size()));

  Values expected = before;
  for (const auto& one : cases) {
    for (size_t i = 0; i < one.rows.size(); ++i) {
      for (int64_t j = 0; j < N; ++j) {
        double& value = expected(one.rows[i], j);
        value = (add ? value : 0) + one.sum(static_cast<int64_t>(i), j);
      }
    }
  }
  expect(y.matrix, expected, text("expand ", M, "x", N, add ? " added" : ""));
}

}  // namespace

template <typename C>
void test_segmented() {
  cases(100, test_schedule);
  cases(100, test_gather_rows<C>);
  cases(100, test_expand<C>);
}

template void test_segmented<float>();
template void test_segmented<BFloat16>();

}  // namespace lora_kernels::tests
