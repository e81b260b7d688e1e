#include "segmented.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "memory.h"
#include "panel.h"
#include "product.h"
#include "store.h"

namespace lora_kernels {

namespace {

thread_local Scratch sum_scratch, part_scratch, panel_scratch;

// y[i, n:n+cols] = or += from.
void store_or_add(const float* from, int64_t cols, const Matrix& y, int64_t i, int64_t n,
                  bool add) {
  if (y.stride_col == 1) return add ? add_row(from, cols, y, i, n) : store_row(from, cols, y, i, n);
  with_type(y.kind, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* to = static_cast<T*>(y.data) + i * y.stride_row + n * y.stride_col;
    for (int64_t j = 0; j < cols; ++j, to += y.stride_col) {
      *to = T(add ? static_cast<float>(*to) + from[j] : from[j]);
    }
  });
}

}  // namespace

void schedule(int64_t M, int64_t slots, int64_t blocks, int64_t block_rows,
              const int32_t* slot_of_row, const int32_t* rank_of_slot, int32_t* order,
              int32_t* start_of_slot, int32_t* block_slot, int32_t* block_start) {
  // Rows without an adapter, those of rank 0 among them, count as one slot more.
  const auto key = [&](int64_t i) -> int64_t {
    const int64_t slot = slot_of_row[i];
    return slot >= 0 && rank_of_slot[slot] > 0 ? slot : slots;
  };
  std::vector<int32_t> next(slots + 2, 0);
  for (int64_t i = 0; i < M; ++i) ++next[key(i) + 1];
  for (int64_t slot = 0; slot <= slots; ++slot) next[slot + 1] += next[slot];
  std::copy_n(next.begin(), slots + 1, start_of_slot);
  for (int64_t i = 0; i < M; ++i) order[next[key(i)]++] = static_cast<int32_t>(i);

  int64_t block = 0;
  for (int64_t slot = 0; slot < slots; ++slot) {
    for (int64_t i = start_of_slot[slot]; i < start_of_slot[slot + 1]; i += block_rows) {
      block_slot[block] = static_cast<int32_t>(slot);
      block_start[block++] = static_cast<int32_t>(i);
    }
  }
  std::fill(block_slot + block, block_slot + blocks, -1);
  std::fill(block_start + block, block_start + blocks, start_of_slot[slots]);
}

template <typename C>
void gather_rows(const Matrix& x, const int32_t* order, int64_t count, int64_t c0, int64_t c1,
                 const DropoutMask* mask, const int64_t* logical, C* out, int64_t ld) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, ld));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      C* to = out + i * ld;
      copy_rows(x, order[i], order[i] + 1, c0, c1, to, ld);
      if (mask) {
        drop(reinterpret_cast<BitsOf<C>*>(to), 1, c1 - c0, ld, 0, 0, *mask, logical + i);
      }
    }
  });
}

template <typename C>
void expand(const Expand<C>* jobs, int64_t count) {
  constexpr int64_t kRowBlock = 96;
  // Of one job all row blocks of a panel come one after the other, so that it is packed once.
  std::vector<int64_t> first_task(count + 1, 0);
  const auto row_blocks = [&](const Expand<C>& job) {
    return ceil_div(job.contributions[0].s.M, kRowBlock);
  };
  for (int64_t i = 0; i < count; ++i) {
    first_task[i + 1] = first_task[i] + panels(jobs[i].y.cols) * row_blocks(jobs[i]);
  }
  at::parallel_for(0, first_task[count], 1, [&](int64_t begin, int64_t end) {
    int64_t packed_job = -1, packed_panel = -1;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t i =
          std::upper_bound(first_task.begin(), first_task.end(), t) - first_task.begin() - 1;
      const Expand<C>& job = jobs[i];
      const int64_t blocks = row_blocks(job), rows = job.contributions[0].s.M;
      const int64_t n = (t - first_task[i]) / blocks * kPanel;
      const int64_t first = (t - first_task[i]) % blocks * kRowBlock;
      const int64_t M = std::min(kRowBlock, rows - first),
                    cols = std::min(kPanel + 0L, job.y.cols - n);
      const int64_t width = panel_width(job.y.cols - n);

      int64_t depth = 0;
      for (int64_t c = 0; c < job.count; ++c) depth += padded<C>(job.contributions[c].s.K);
      C* panel = panel_scratch.of<C>(depth * kPanel);
      if (packed_job != i || packed_panel != n) {
        C* to = panel;
        for (int64_t c = 0; c < job.count; ++c) {
          const Matrix& b = job.contributions[c].b;
          pack_panel(b, 0, b.rows, n, to);
          to += padded<C>(b.rows) * kPanel;
        }
        packed_job = i;
        packed_panel = n;
      }

      float* sum = sum_scratch.of<float>(kRowBlock * kPanel);
      for (int64_t c = 0; c < job.count; ++c) {
        const auto& [s, b, mask] = job.contributions[c];
        // A mask is for its own product alone, not for what was summed before it.
        float* tile = mask && c > 0 ? part_scratch.of<float>(kRowBlock * kPanel) : sum;
        product_by_parts(
            M, width, s.K, s.data + first * s.ld, s.ld,
            [&](int64_t k, int64_t) { return panel + k * width; }, tile, c > 0 && tile == sum);
        if (mask) {
          drop(reinterpret_cast<uint32_t*>(tile), M, cols, kPanel, 0, n, *mask,
               job.logical + first);
        }
        if (tile != sum) {
          for (int64_t j = 0; j < M * kPanel; ++j) sum[j] += tile[j];
        }
        panel += padded<C>(s.K) * kPanel;
      }
      for (int64_t r = 0; r < M; ++r) {
        store_or_add(sum + r * kPanel, cols, job.y, job.rows[first + r], n, job.add);
      }
    }
    release_products();
  });
}

#define LORA_KERNELS_INSTANTIATE(C)                                                      \
  template void gather_rows<C>(const Matrix&, const int32_t*, int64_t, int64_t, int64_t, \
                               const DropoutMask*, const int64_t*, C*, int64_t);         \
  template void expand<C>(const Expand<C>*, int64_t);

LORA_KERNELS_INSTANTIATE(float)
LORA_KERNELS_INSTANTIATE(BFloat16)

}  // namespace lora_kernels
