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
// dependent multiplications of one. A block of a matrix may be narrower than that.
constexpr int kRowCounters = 32;
constexpr int kBlockCounters = 8;

// The lanes of kCounters neighbouring counters of one row, in the order of the columns.
template <int kCounters>
void random_lanes(uint16_t (&lanes)[kLanesPerCounter * kCounters], uint64_t row,
                  uint64_t first_group, const DropoutMask& mask) {
  constexpr int kWidth = sizeof(PhiloxLanes) / sizeof(uint64_t);
  PhiloxLanes groups;
  for (int i = 0; i < kWidth; ++i) groups[i] = first_group + static_cast<uint64_t>(i);
  const PhiloxLanes zero = {};

  // A counter's four words side by side are its eight lanes, low half first, as little-endian
  // memory has them.
  static_assert(std::endian::native == std::endian::little);
  uint64_t words[2 * kCounters];
  static_assert(sizeof(words) == sizeof(lanes));
#pragma GCC unroll 2
  for (int begin = 0; begin < kCounters; begin += kWidth) {
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
void keep(const Bits* x, Bits* out, const uint16_t* __restrict lanes, int64_t columns,
          int64_t stride_xk, uint32_t threshold) {
  for (int64_t j = 0; j < columns; ++j) {
    const Bits value = x[j * stride_xk];
    out[j] = lanes[j] >= threshold ? value : Bits{0};
  }
}

template <int kCounters, typename Bits>
void masked_row(const Bits* x, Bits* out, int64_t K, int64_t stride_xk, uint64_t row, int64_t col,
                const DropoutMask& mask) {
  constexpr int64_t kColumns = kLanesPerCounter * kCounters;
  alignas(64) uint16_t lanes[kColumns];
  // col may lie inside a counter's eight lanes: the first block then gives up the lanes before it.
  uint64_t group = static_cast<uint64_t>(col) / kLanesPerCounter;
  int64_t skip = col % kLanesPerCounter;
  for (int64_t j = 0; j < K;) {
    random_lanes<kCounters>(lanes, row, group, mask);
    const int64_t columns = std::min(kColumns - skip, K - j);
    if (stride_xk == 1) {
      keep(x + j, out + j, lanes + skip, columns, 1, mask.threshold);
    } else {
      keep(x + j * stride_xk, out + j, lanes + skip, columns, stride_xk, mask.threshold);
    }
    j += columns;
    group += kCounters;
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
      masked_row<kRowCounters>(x + i * stride_xm, out + i * K, K, stride_xk, row, mask.col0, mask);
    }
  });
}

template <typename Bits>
void drop(Bits* block, int64_t M, int64_t K, int64_t ld, int64_t row, int64_t col,
          const DropoutMask& mask, const int64_t* rows) {
  for (int64_t i = 0; i < M; ++i) {
    const int64_t at = rows ? rows[i] : row + i;
    const uint64_t logical_row = static_cast<uint64_t>(mask.row0) + static_cast<uint64_t>(at);
    masked_row<kBlockCounters>(block + i * ld, block + i * ld, K, 1, logical_row, mask.col0 + col,
                               mask);
  }
}

template void masked<uint16_t>(const uint16_t*, uint16_t*, int64_t, int64_t, int64_t, int64_t,
                               const DropoutMask&);
template void masked<uint32_t>(const uint32_t*, uint32_t*, int64_t, int64_t, int64_t, int64_t,
                               const DropoutMask&);
template void masked<uint64_t>(const uint64_t*, uint64_t*, int64_t, int64_t, int64_t, int64_t,
                               const DropoutMask&);
template void drop<uint16_t>(uint16_t*, int64_t, int64_t, int64_t, int64_t, int64_t,
                             const DropoutMask&, const int64_t*);
template void drop<uint32_t>(uint32_t*, int64_t, int64_t, int64_t, int64_t, int64_t,
                             const DropoutMask&, const int64_t*);

}  // namespace lora_kernels
