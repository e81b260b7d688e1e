#include "dropout.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "philox.h"

namespace lora_kernels {

namespace {

constexpr int kLanesPerCounter = 8;
// Neighbouring counters of a row whose lanes are made at once: enough vectors to hide the ten
// dependent multiplications of one.
constexpr int kBlockCounters = 32;
constexpr int kBlockColumns = kLanesPerCounter * kBlockCounters;

// The lanes of kBlockCounters neighbouring counters of one row, in the order of the columns.
void random_lanes(uint16_t (&lanes)[kBlockColumns], uint64_t row, uint64_t first_group,
                  const DropoutMask& mask) {
  constexpr int kWidth = sizeof(PhiloxLanes) / sizeof(uint64_t);
  PhiloxLanes groups;
  for (int i = 0; i < kWidth; ++i) groups[i] = first_group + static_cast<uint64_t>(i);
  const PhiloxLanes zero = {};

  // A counter's four words side by side are its eight lanes, low half first, as little-endian
  // memory has them.
  static_assert(std::endian::native == std::endian::little);
  uint64_t words[2 * kBlockCounters];
  static_assert(sizeof(words) == sizeof(lanes));
#pragma GCC unroll 2
  for (int begin = 0; begin < kBlockCounters; begin += kWidth) {
    const PhiloxWords c =
        philox4x32_10({zero + row, groups + static_cast<uint64_t>(begin), zero + mask.offset,
                       zero + (mask.offset >> 32)},
                      static_cast<uint32_t>(mask.seed), static_cast<uint32_t>(mask.seed >> 32));
    const PhiloxLanes words01 = (c.c0 & 0xFFFFFFFFu) | (c.c1 << 32);
    const PhiloxLanes words23 = (c.c2 & 0xFFFFFFFFu) | (c.c3 << 32);
    for (int i = 0; i < kWidth; ++i) {
      words[2 * (begin + i)] = words01[i];
      words[2 * (begin + i) + 1] = words23[i];
    }
  }
  std::memcpy(lanes, words, sizeof(words));
}

template <typename Bits>
void keep(const Bits* __restrict x, Bits* __restrict out, const uint16_t* __restrict lanes,
          int64_t columns, int64_t stride_xk, uint32_t threshold) {
  for (int64_t j = 0; j < columns; ++j) {
    const Bits value = x[j * stride_xk];
    out[j] = lanes[j] >= threshold ? value : Bits{0};
  }
}

template <typename Bits>
void masked_row(const Bits* x, Bits* out, int64_t K, int64_t stride_xk, uint64_t row,
                const DropoutMask& mask) {
  alignas(64) uint16_t lanes[kBlockColumns];
  // col0 may lie inside a counter's eight lanes: the first block then gives up the lanes before it.
  uint64_t group = static_cast<uint64_t>(mask.col0) / kLanesPerCounter;
  int64_t skip = mask.col0 % kLanesPerCounter;
  for (int64_t j = 0; j < K;) {
    random_lanes(lanes, row, group, mask);
    const int64_t columns = std::min(kBlockColumns - skip, K - j);
    if (stride_xk == 1) {
      keep(x + j, out + j, lanes + skip, columns, 1, mask.threshold);
    } else {
      keep(x + j * stride_xk, out + j, lanes + skip, columns, stride_xk, mask.threshold);
    }
    j += columns;
    group += kBlockCounters;
    skip = 0;
  }
}

}  // namespace

uint32_t dropout_threshold(double dropout_p) {
  return static_cast<uint32_t>(std::min(std::floor(dropout_p * 65536.0 + 0.5), 65535.0));
}

template <typename Bits>
void masked(const Bits* x, Bits* out, int64_t M, int64_t K, int64_t stride_xm, int64_t stride_xk,
            const DropoutMask& mask) {
  // A task of this many elements is long against the cost of handing it to a thread (a guess).
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, K));
  at::parallel_for(0, M, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint64_t row = static_cast<uint64_t>(mask.row0) + static_cast<uint64_t>(i);
      masked_row(x + i * stride_xm, out + i * K, K, stride_xk, row, mask);
    }
  });
}

template void masked<uint16_t>(const uint16_t*, uint16_t*, int64_t, int64_t, int64_t, int64_t,
                               const DropoutMask&);
template void masked<uint32_t>(const uint32_t*, uint32_t*, int64_t, int64_t, int64_t, int64_t,
                               const DropoutMask&);
template void masked<uint64_t>(const uint64_t*, uint64_t*, int64_t, int64_t, int64_t, int64_t,
                               const DropoutMask&);

}  // namespace lora_kernels
