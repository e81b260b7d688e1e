#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "linear.h"
#include "memory.h"
#include "panel.h"
#include "product.h"
#include "store.h"

namespace lora_kernels {

namespace {

// Up to this many rows the threads share the inner axis of one shrink, above it its rows. Either
// way the parts of the inner axis are summed one by one and added in their order.
constexpr int64_t kFewRows = 32;
constexpr int64_t kShrinkRows = 48;

struct ShrinkPlan {
  ConstMatrix b;  // [K, r]
  int64_t panels, parts;
  int64_t block, blocks;  // rows of a task
  int64_t first_piece, first_block;
  bool few;
  int64_t offset;  // of its panels, or with few rows of its sums [panels][parts][M][kPanel]
};

// Rows of S from their float32 sums, a tile a panel of the rank.
template <typename C>
void finish_shrink(float* tiles, int64_t tile_size, int64_t first, int64_t M,
                   const Shrink<C>& job) {
  const int64_t r = job.a.rows, ld = padded<C>(r);
  for (int64_t i = 0; i < M; ++i) {
    const int64_t row = job.rows ? job.rows[first + i] : first + i;
    C* to = job.s_rows ? job.s_rows + (first + i) * ld : nullptr;
    for (int64_t n = 0; n < r; n += kPanel) {
      float* sums = tiles + n / kPanel * tile_size + i * kPanel;
      const int64_t cols = std::min<int64_t>(kPanel, r - n);
      for (int64_t j = 0; j < cols; ++j) sums[j] *= job.scales ? job.scales[n + j] : job.scale;
      if (job.s.data) store_row(sums, cols, job.s, row, n);
      if (to) {
        for (int64_t j = 0; j < cols; ++j) to[n + j] = C(sums[j]);
      }
    }
    if (to && ld > r) to[r] = C(0.0f);
  }
}

// Rows of x from `first` on, columns from k on, with the mask applied: in place, or as a copy.
template <typename C>
Rows<C> masked_part(const Shrink<C>& job, int64_t first, int64_t M, int64_t k, int64_t depth) {
  const C* rows = job.x.data + first * job.x.ld + k;
  if (!job.mask) return {rows, M, depth, job.x.ld};
  C* copy = rows_scratch.of<C>(M * kPart<C>);
  for (int64_t i = 0; i < M; ++i) {
    std::memcpy(static_cast<void*>(copy + i * kPart<C>), rows + i * job.x.ld, depth * sizeof(C));
  }
  drop_values(copy, M, depth, kPart<C>, first, k, *job.mask);
  return {copy, M, depth, kPart<C>};
}

template <typename C>
void shrink_block(const Shrink<C>& job, const ShrinkPlan& plan, const C* packed, int64_t first,
                  int64_t M) {
  const int64_t K = job.x.K, size = plan.block * kPanel;
  float* tiles = tile_scratch.of<float>(plan.panels * size);
  for (int64_t k = 0; k == 0 || k < K; k += kPart<C>) {
    const int64_t depth = padded<C>(std::min(kPart<C>, K - k));
    const Rows<C> rows = masked_part(job, first, M, k, depth);
    for (int64_t p = 0; p < plan.panels; ++p) {
      const int64_t n = p * kPanel, width = panel_width(plan.b.cols - n);
      const C* panel = packed + n * padded<C>(K) + k * width;
      float* tile = tiles + p * size;
      float* sums = k == 0 ? tile : part_scratch.of<float>(M * kPanel);
      product_in_halves(M, width, depth, rows.data, rows.ld, panel, sums);
      for (int64_t i = 0; k > 0 && i < M * kPanel; ++i) tile[i] += sums[i];
    }
  }
  finish_shrink(tiles, size, first, M, job);
}

// The task `t` of those whose first numbers are `first(plan)`.
template <typename Plan, typename First>
const Plan& plan_of(const Plan* plans, int64_t count, int64_t t, First first) {
  const Plan* after = std::upper_bound(
      plans, plans + count, t, [&](int64_t task, const Plan& plan) { return task < first(plan); });
  return *(after - 1);
}

}  // namespace

template <typename C>
void shrink(const Shrink<C>* jobs, int64_t count) {
  if (count == 0) return;
  const int64_t threads = at::get_num_threads();
  std::unique_ptr<ShrinkPlan[]> plans(new ShrinkPlan[count]);
  int64_t pieces = 0, blocks = 0, packed_total = 0, sums_total = 0, products = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t M = jobs[i].x.M, K = jobs[i].x.K, r = jobs[i].a.rows;
    ShrinkPlan& plan = plans[i];
    plan.b = jobs[i].a.transposed();
    plan.panels = M > 0 ? panels(r) : 0;
    plan.parts = std::max<int64_t>(1, ceil_div(K, kPart<C>));
    plan.few = M <= kFewRows;
    plan.block = plan.few ? kFewRows : ceil_div(M, threads * ceil_div(M, threads * kShrinkRows));
    plan.blocks = ceil_div(M, plan.block);
    plan.first_piece = pieces;
    plan.first_block = blocks;
    if (plan.few || !jobs[i].packed) pieces += plan.panels * plan.parts;
    blocks += plan.blocks;
    products += M * K * r;
    int64_t& total = plan.few ? sums_total : packed_total;
    plan.offset = total;
    if (plan.few) {
      total += plan.panels * plan.parts * M * kPanel;
    } else if (!jobs[i].packed) {
      total += packed_size<C>(K, r);
    }
  }
  auto packed = allocate<C>(packed_total);
  auto sums = allocate<float>(sums_total);

  // Pieces of the adapters are packed, and with few rows multiplied at once.
  at::parallel_for(0, pieces, grain_of(pieces, products), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto& plan =
          plan_of(plans.get(), count, t, [](const ShrinkPlan& p) { return p.first_piece; });
      const Shrink<C>& job = jobs[&plan - plans.get()];
      const int64_t M = job.x.M, K = job.x.K, piece = t - plan.first_piece;
      const int64_t p = piece % plan.panels, part = piece / plan.panels;
      const int64_t n = p * kPanel, k = part * kPart<C>, k_end = std::min(K, k + kPart<C>);
      const int64_t width = panel_width(plan.b.cols - n), depth = padded<C>(k_end - k);
      if (!plan.few) {
        pack_panel(plan.b, k, k_end, n, packed.get() + plan.offset + n * padded<C>(K) + k * width);
        continue;
      }
      C* own = job.packed ? nullptr : panel_scratch.of<C>(kPart<C> * kPanel);
      if (own) pack_panel(plan.b, k, k_end, n, own);
      const C* panel = own ? own : job.packed + n * padded<C>(K) + k * width;
      const Rows<C> rows = masked_part(job, 0, M, k, depth);
      product_in_halves(M, width, depth, rows.data, rows.ld, panel,
                        sums.get() + plan.offset + (p * plan.parts + part) * M * kPanel);
    }
    release_products();
  });

  at::parallel_for(0, blocks, grain_of(blocks, products), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto& plan =
          plan_of(plans.get(), count, t, [](const ShrinkPlan& p) { return p.first_block; });
      const Shrink<C>& job = jobs[&plan - plans.get()];
      const int64_t M = job.x.M, first = (t - plan.first_block) * plan.block;
      if (!plan.few) {
        const C* panels = job.packed ? job.packed : packed.get() + plan.offset;
        shrink_block(job, plan, panels, first, std::min(plan.block, M - first));
        continue;
      }
      float* own = sums.get() + plan.offset;
      const int64_t size = M * kPanel;
      for (int64_t p = 0; p < plan.panels; ++p) {
        float* tile = own + p * plan.parts * size;
        for (int64_t part = 1; part < plan.parts; ++part) {
          for (int64_t i = 0; i < size; ++i) tile[i] += tile[part * size + i];
        }
      }
      finish_shrink(own, plan.parts * size, 0, M, job);
    }
    release_products();
  });
}

template void shrink(const Shrink<float>*, int64_t);
template void shrink(const Shrink<BFloat16>*, int64_t);

}  // namespace lora_kernels
