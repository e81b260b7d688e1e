#include "segmented.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "panel.h"

namespace lora_kernels {

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
void gather_rows(const ConstMatrix& x, const int32_t* order, int64_t count, int64_t c0, int64_t c1,
                 const DropoutMask* mask, const int64_t* logical, C* out, int64_t ld) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, ld));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      C* to = out + i * ld;
      copy_rows(x, order[i], order[i] + 1, c0, c1, to, ld);
      if (mask) {
        drop_values(to, 1, c1 - c0, ld, 0, 0, *mask, logical + i);
      }
    }
  });
}

template void gather_rows<float>(const ConstMatrix&, const int32_t*, int64_t, int64_t, int64_t,
                                 const DropoutMask*, const int64_t*, float*, int64_t);
template void gather_rows<BFloat16>(const ConstMatrix&, const int32_t*, int64_t, int64_t, int64_t,
                                    const DropoutMask*, const int64_t*, BFloat16*, int64_t);

}  // namespace lora_kernels
