#include "linear.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>

#include "memory.h"
#include "panel.h"
#include "product.h"
#include "store.h"
#include "vec.h"

namespace lora_kernels {

namespace {

thread_local Scratch tile_scratch, rows_scratch, panel_scratch, tail_scratch, part_scratch;

template <typename C>
C* drop_rows(C* rows, int64_t M, int64_t K, int64_t ld, int64_t row, int64_t col,
             const DropoutMask& mask) {
  drop(reinterpret_cast<BitsOf<C>*>(rows), M, K, ld, row, col, mask);
  return rows;
}

}  // namespace

template <typename C>
void copy_all_rows(const Matrix& x, C* out, int64_t ld) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, x.cols));
  at::parallel_for(0, x.rows, grain, [&](int64_t begin, int64_t end) {
    copy_rows(x, begin, end, 0, x.cols, out + begin * ld, ld);
  });
}

template <typename C>
void pack(const Matrix& b, C* packed) {
  const int64_t K = b.rows, parts = ceil_div(K, kPart<C>);
  at::parallel_for(0, panels(b.cols) * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / parts * kPanel, k = t % parts * kPart<C>;
      C* panel = packed + n * padded<C>(K) + k * panel_width(b.cols - n);
      pack_panel(b, k, std::min(K, k + kPart<C>), n, panel);
    }
  });
}

template <typename C>
bool is_packed(const Matrix& b, const C* packed) {
  constexpr int64_t kSamples = 64;
  // Steps that are coprime to powers of two and far from small multiples of usual sizes.
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t k = i * 7919 % b.rows, n = i * 104729 % b.cols;
    const int64_t n0 = n / kPanel * kPanel, width = panel_width(b.cols - n0);
    const int64_t row = n0 * padded<C>(b.rows) + k / kStep<C> * kStep<C> * width;
    const C held = packed[row + (n - n0) * kStep<C> + k % kStep<C>];
    C value;
    with_type(b.kind, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      value =
          C(static_cast<float>(static_cast<const T*>(b.data)[k * b.stride_row + n * b.stride_col]));
    });
    if (std::memcmp(&held, &value, sizeof(C)) != 0) return false;
  }
  return true;
}

namespace {

// Up to this many rows the threads share the inner axis of one shrink, above it its rows. Either
// way the parts of the inner axis are summed one by one and added in their order.
constexpr int64_t kFewRows = 32;
constexpr int64_t kShrinkRows = 48;

struct ShrinkPlan {
  Matrix b;  // [K, r]
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
      for (int64_t j = 0; j < cols; ++j) sums[j] *= job.scale;
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
  return {drop_rows(copy, M, depth, kPart<C>, first, k, *job.mask), M, depth, kPart<C>};
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
      product(M, width, depth, rows.data, rows.ld, panel, tiles + p * size, k > 0);
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
  int64_t pieces = 0, blocks = 0, packed_total = 0, sums_total = 0;
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
    pieces += plan.panels * plan.parts;
    blocks += plan.blocks;
    int64_t& total = plan.few ? sums_total : packed_total;
    plan.offset = total;
    total += plan.few ? plan.panels * plan.parts * M * kPanel : packed_size<C>(K, r);
  }
  auto packed = allocate<C>(packed_total);
  auto sums = allocate<float>(sums_total);

  // Pieces of the adapters are packed, and with few rows multiplied at once.
  at::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
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
      C* panel = panel_scratch.of<C>(kPart<C> * kPanel);
      pack_panel(plan.b, k, k_end, n, panel);
      const Rows<C> rows = masked_part(job, 0, M, k, depth);
      product(M, width, depth, rows.data, rows.ld, panel,
              sums.get() + plan.offset + (p * plan.parts + part) * M * kPanel, false);
    }
    release_products();
  });

  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const auto& plan =
          plan_of(plans.get(), count, t, [](const ShrinkPlan& p) { return p.first_block; });
      const Shrink<C>& job = jobs[&plan - plans.get()];
      const int64_t M = job.x.M, first = (t - plan.first_block) * plan.block;
      if (!plan.few) {
        shrink_block(job, plan, packed.get() + plan.offset, first, std::min(plan.block, M - first));
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

namespace {

// The tails' share of tiles. The panels of a segment are packed when its rows are first met at a
// panel of columns: tiles come row block by row block, so that this is once a thread.
template <typename C>
class TailTiles {
 public:
  explicit TailTiles(const TailProduct<C>& product) : p_(product) {}

  // tile [M, kPanel] = the tails of rows [first, first + M), columns [n, n + cols); zero without.
  void write(int64_t first, int64_t M, int64_t n, int64_t cols, float* tile) {
    int64_t done = 0;
    for (int64_t i = 0; i < p_.count; ++i) {
      const int64_t begin = std::max<int64_t>(0, p_.segments[i].first - first);
      const int64_t end = std::min(M, p_.segments[i].first + p_.segments[i].rows - first);
      if (begin >= end) continue;
      std::fill(tile + done * kPanel, tile + begin * kPanel, 0.0f);
      write_segment(i, first + begin, end - begin, n, cols, tile + begin * kPanel);
      done = end;
    }
    std::fill(tile + done * kPanel, tile + M * kPanel, 0.0f);
  }

 private:
  // Columns of the product that lie in one of its panels and in a slice.
  struct Columns {
    int64_t begin, end;
    Matrix b;       // up to the last of them
    int64_t first;  // of them in b
  };

  Columns columns_of(const Tail<C>& tail, int64_t n) const {
    const int64_t begin = std::max(n, tail.column);
    const int64_t end = std::min({n + kPanel, p_.y.cols, tail.column + tail.b.cols});
    Matrix b = tail.b;
    b.cols = end - tail.column;
    return {begin, end, b, begin - tail.column};
  }

  // Few rows are soon multiplied: what the next panels are packed from would be waited for (in a
  // batch of 8 adapters 2 KiB here and there; a guess that this helps, not measured).
  void prefetch(int64_t i, int64_t n) const {
    for (int64_t c = 0; c < p_.segments[i].count; ++c) {
      const auto [begin, end, b, first] = columns_of(p_.segments[i].tails[c], n);
      if (begin < end) prefetch_panel(b, first);
    }
  }

  void write_segment(int64_t i, int64_t first, int64_t M, int64_t n, int64_t cols, float* tile) {
    const TailedRows<C>& segment = p_.segments[i];
    int64_t depth = 0;
    for (int64_t c = 0; c < segment.count; ++c) depth += padded<C>(segment.tails[c].s.K);
    C* panel = tail_scratch.of<C>(depth * kPanel);
    const bool fresh = segment_ != i || column_ != n;
    segment_ = i;
    column_ = n;
    if (fresh && i + 1 < p_.count) prefetch(i + 1, n);
    if (fresh && i + 1 == p_.count) prefetch(0, n + kPanel);

    bool written = false;
    for (int64_t c = 0; c < segment.count; ++c) {
      const Rows<C>& s = segment.tails[c].s;
      const DropoutMask* mask = segment.tails[c].mask;
      const auto [begin, end, b, first_of_b] = columns_of(segment.tails[c], n);
      if (begin >= end) continue;
      if (fresh) pack_panel(b, 0, s.K, first_of_b, panel);
      // A slice may end within the panel, and a mask is for its own product alone.
      const bool whole = begin == n && end == n + cols, apart = !whole || (mask && written);
      if (!whole && !written) std::fill(tile, tile + M * kPanel, 0.0f);
      float* sums = apart ? part_scratch.of<float>(M * kPanel) : tile;
      const int64_t width = panel_width(end - begin);
      product_by_parts(
          M, width, s.K, s.data + (first - segment.first) * s.ld, s.ld,
          [&](int64_t k, int64_t) { return panel + k * width; }, sums, written && !apart);
      if (mask) {
        drop(reinterpret_cast<uint32_t*>(sums), M, end - begin, kPanel, first, begin, *mask,
             p_.logical ? p_.logical + first : nullptr);
      }
      for (int64_t r = 0; apart && r < M; ++r) {
        float* to = tile + r * kPanel + begin - n;
        for (int64_t j = 0; j < end - begin; ++j) to[j] += sums[r * kPanel + j];
      }
      written = true;
      panel += padded<C>(s.K) * width;
    }
    if (!written) std::fill(tile, tile + M * kPanel, 0.0f);
  }

  const TailProduct<C>& p_;
  int64_t segment_ = -1, column_ = -1;  // whose panels tail_scratch holds
};

}  // namespace

template <typename C>
void tail_product(const TailProduct<C>& p) {
  // Rows of a tile: its accumulators and a part's rows stay in the second-level cache.
  constexpr int64_t kRowBlock = 192, kLeastRows = 24;
  const int64_t M = p.x.M, K = p.x.K, N = p.y.cols;
  if (M == 0 || N == 0) return;
  const int64_t P = panels(N), threads = at::get_num_threads();
  const int64_t blocks =
      std::max(ceil_div(M, kRowBlock), std::min(ceil_div(M, kLeastRows), ceil_div(4 * threads, P)));
  const int64_t block = ceil_div(M, blocks);

  // All row blocks of a panel come one after the other, so that it is packed once.
  at::parallel_for(0, P * blocks, 1, [&](int64_t begin, int64_t end) {
    float* tile = tile_scratch.of<float>(block * kPanel);
    C* own = p.packed ? nullptr : panel_scratch.of<C>(padded<C>(K) * kPanel);
    TailTiles<C> tails(p);
    int64_t current = -1;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / blocks * kPanel, cols = std::min<int64_t>(kPanel, N - n);
      const int64_t first = t % blocks * block, rows = std::min(block, M - first);
      if (rows <= 0) continue;
      const int64_t width = panel_width(cols);
      const bool fresh = current != n;
      current = n;

      tails.write(first, rows, n, cols, tile);
      const C* x = p.x.data + first * p.x.ld;
      const C* panel = p.packed ? p.packed + n * padded<C>(K) : own;
      if (own && reads_in_place<C>(block, p.w, n)) {
        product_in_place<C>(rows, width, x, p.x.ld, p.w, n, tile);
      } else {
        product_by_parts(
            rows, width, K, x, p.x.ld,
            [&](int64_t k, int64_t k_end) {
              if (own && fresh) pack_panel(p.w, k, k_end, n, own + k * width);
              return panel + k * width;
            },
            tile, true);
      }

      for (int64_t i = 0; i < rows; ++i) {
        float* sums = tile + i * kPanel;
        if (p.out_scale) {
          for (int64_t j = 0; j < cols; ++j) sums[j] *= p.out_scale[n + j];
        }
        if (p.bias) {
          for (int64_t j = 0; j < cols; ++j) sums[j] += p.bias[n + j];
        }
        store_or_add(sums, cols, p.y, p.rows ? p.rows[first + i] : first + i, n, p.add);
      }
    }
    release_products();
  });
}

template <typename C>
void reduce(const Reduction<C>* reductions, int64_t count) {
  // The transposed tails, rows along the reduced axis; with a last row of ones for the plain sums.
  struct Plan {
    std::unique_ptr<C, FreeAligned> tails;
    int64_t rows, ld;
  };
  std::unique_ptr<Plan[]> plans(new Plan[count]);
  // Fewer multiplications than this are done sooner than another thread is called (a guess).
  constexpr int64_t kFewProducts = 16384;
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
            drop_rows(copy, m_end - m, cols, kPanel, m, n, *mask);
            pack_panel(Matrix{copy, kind_of<C>, m_end - m, cols, kPanel, 1}, 0, m_end - m, 0,
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
      const Matrix columns = {tile, Kind::kFloat, cols, r, 1, kPanel};
      float* rows = tail_scratch.of<float>(cols * r);
      copy_rows(columns, 0, cols, 0, r, rows, r);
      for (int64_t c = 0; c < cols; ++c) store_row(rows + c * r, r, out.transposed(), n + c, 0);
    }
    if (sums.data) store_row(tile + r * kPanel, cols, sums, 0, n);
  };
  // Every thread has its share of each reduction: those with a mask take twice as long. Of single
  // panels the shares go around.
  const int64_t threads = at::get_num_threads(), grain = products < kFewProducts ? threads : 1;
  at::parallel_for(0, threads, grain, [&](int64_t begin, int64_t end) {
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

#define LORA_KERNELS_INSTANTIATE(C)                           \
  template void copy_all_rows<C>(const Matrix&, C*, int64_t); \
  template void pack<C>(const Matrix&, C*);                   \
  template bool is_packed<C>(const Matrix&, const C*);        \
  template void shrink<C>(const Shrink<C>*, int64_t);         \
  template void tail_product<C>(const TailProduct<C>&);       \
  template void reduce<C>(const Reduction<C>*, int64_t);

LORA_KERNELS_INSTANTIATE(float)
LORA_KERNELS_INSTANTIATE(BFloat16)

}  // namespace lora_kernels
