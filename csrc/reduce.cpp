#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "linear.h"
#include "memory.h"
#include "panel.h"
#include "product.h"
#include "store.h"

namespace lora_kernels {

template <typename C>
void reduce(const Reduction<C>* reductions, int64_t count) {
  // The transposed tails, rows along the reduced axis; with a last row of ones for the plain sums.
  struct Plan {
    std::unique_ptr<C, FreeAligned> tails;
    int64_t rows, ld;
  };
  std::unique_ptr<Plan[]> plans(new Plan[count]);
  int64_t products = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto& reduction = reductions[i];
    const int64_t M = reduction.x.rows, r = reduction.out.data ? reduction.tail.cols : 0;
    Plan& plan = plans[i];
    plan = {nullptr, r + (reduction.sums.data != nullptr), padded<C>(M)};
    products += M * plan.rows * reduction.x.cols;
    plan.tails = allocate<C>(plan.rows * plan.ld);
    if (r > 0) copy_all_rows(reduction.tail.transposed(), plan.tails.get(), plan.ld);
    if (plan.rows > r) {
      C* ones = plan.tails.get() + r * plan.ld;
      std::fill(ones, ones + M, C(1.0f));
      std::fill(ones + M, ones + plan.ld, C(0.0f));
    }
  }

  // The panel of reduction i at column n.
  const auto write_panel = [&](int64_t i, int64_t n) {
    const Plan& plan = plans[i];
    const auto& [tail, x, mask, out, sums] = reductions[i];
    const int64_t cols = std::min<int64_t>(kPanel, x.cols - n);
    C* panel = panel_scratch.of<C>(kPart<C> * kPanel);
    float* tile = tile_scratch.of<float>(plan.rows * kPanel);
    product_by_parts(
        plan.rows, panel_width(x.cols - n), x.rows, plan.tails.get(), plan.ld,
        [&, &x = x, &mask = mask](int64_t m, int64_t m_end) {
          if (mask) {
            C* copy = rows_scratch.of<C>(kPart<C> * kPanel);
            copy_rows(x, m, m_end, n, n + cols, copy, kPanel);
            drop_values(copy, m_end - m, cols, kPanel, m, n, *mask);
            pack_panel(ConstMatrix{copy, kind_of<C>, m_end - m, cols, kPanel, 1}, 0, m_end - m, 0,
                       panel);
          } else {
            pack_panel(x, m, m_end, n, panel);
          }
          return panel;
        },
        tile, false);
    const int64_t r = out.data ? tail.cols : 0;
    if (r > 0 && out.stride_col == 1) {
      for (int64_t j = 0; j < r; ++j) store_row(tile + j * kPanel, cols, out, j, n);
    } else if (r > 0) {
      // dB: its rows are the tile's columns.
      const ConstMatrix columns = {tile, Kind::kFloat, cols, r, 1, kPanel};
      float* rows = tail_scratch.of<float>(cols * r);
      copy_rows(columns, 0, cols, 0, r, rows, r);
      for (int64_t c = 0; c < cols; ++c) store_row(rows + c * r, r, out.transposed(), n + c, 0);
    }
    if (sums.data) store_row(tile + r * kPanel, cols, sums, 0, n);
  };
  // Every thread has its share of each reduction: those with a mask take twice as long. Of single
  // panels the shares go around.
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, grain_of(threads, products), [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t share = (thread + i) % threads, all = panels(reductions[i].x.cols);
        for (int64_t p = all * share / threads; p < all * (share + 1) / threads; ++p) {
          write_panel(i, p * kPanel);
        }
      }
    }
    release_products();
  });
}

template void reduce(const Reduction<float>*, int64_t);
template void reduce(const Reduction<BFloat16>*, int64_t);

}  // namespace lora_kernels
