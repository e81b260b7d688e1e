#include "dropout.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "philox.h"

namespace lora_kernels {

namespace {

constexpr int kLanesPerCounter = 8;
// Neighbouring counters of a row whose lanes are made at once: enough vectors to hide the ten
// dependent multiplications of one. A block of a matrix may be narrower than that.
constexpr int kRowCounters = 32;
constexpr int kBlockCounters = 8;

template <int... i>
PhiloxLanes counting(std::integer_sequence<int, i...>) {
  return PhiloxLanes{i...};
}

template <int... i>
std::pair<PhiloxLanes, PhiloxLanes> interleave(PhiloxLanes a, PhiloxLanes b,
                                               std::integer_sequence<int, i...>) {
  constexpr int kWidth = sizeof...(i);
  return {__builtin_shufflevector(a, b, (i / 2 + i % 2 * kWidth)...),
          __builtin_shufflevector(a, b, (kWidth / 2 + i / 2 + i % 2 * kWidth)...)};
}

// The lanes of kCounters neighbouring counters of one row, in the order of the columns.
template <int kCounters>
void random_lanes(uint16_t (&lanes)[kLanesPerCounter * kCounters], uint64_t row,
                  uint64_t first_group, const DropoutMask& mask) {
  constexpr int kWidth = sizeof(PhiloxLanes) / sizeof(uint64_t);
  const PhiloxLanes zero = {};
  const PhiloxLanes groups = first_group + counting(std::make_integer_sequence<int, kWidth>{});

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
    const auto [low, high] =
        interleave(words01, words23, std::make_integer_sequence<int, kWidth>{});
    std::memcpy(words + 2 * begin, &low, sizeof(low));
    std::memcpy(words + 2 * begin + kWidth, &high, sizeof(high));
  }
  std::memcpy(lanes, words, sizeof(words));
}

// out may be x: both are then read and written at the same places, which a compiler must be told.
template <typename Bits>
void keep(const Bits* x, Bits* out, const uint16_t* lanes, int64_t columns, int64_t stride_xk,
          uint32_t threshold) {
#pragma GCC ivdep
  for (int64_t j = 0; j < columns; ++j) {
    const Bits value = x[j * stride_xk];
    out[j] = lanes[j] >= threshold ? value : Bits{0};
  }
}

// Calls keep_block(first column, lanes, columns) for the columns of one row, a block at a time.
template <int kCounters, typename KeepBlock>
void for_lanes(int64_t K, uint64_t row, int64_t col, const DropoutMask& mask,
               KeepBlock keep_block) {
  constexpr int64_t kColumns = kLanesPerCounter * kCounters;
  alignas(64) uint16_t lanes[kColumns];
  // col may lie inside a counter's eight lanes: the first block then gives up the lanes before it.
  uint64_t group = static_cast<uint64_t>(col) / kLanesPerCounter;
  int64_t skip = col % kLanesPerCounter;
  for (int64_t j = 0; j < K;) {
    random_lanes<kCounters>(lanes, row, group, mask);
    const int64_t columns = std::min(kColumns - skip, K - j);
    keep_block(j, lanes + skip, columns);
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
      const Bits* from = x + i * stride_xm;
      for_lanes<kRowCounters>(
          K, row, mask.col0, mask, [&](int64_t j, const uint16_t* lanes, int64_t columns) {
            Bits* to = out + i * K + j;
            if (stride_xk == 1) {
              keep(from + j, to, lanes, columns, 1, mask.threshold);
            } else {
              keep(from + j * stride_xk, to, lanes, columns, stride_xk, mask.threshold);
            }
          });
    }
  });
}

template <typename Bits>
void drop(Bits* block, int64_t M, int64_t K, int64_t ld, int64_t row, int64_t col,
          const DropoutMask& mask, const int64_t* rows) {
  for (int64_t i = 0; i < M; ++i) {
    const int64_t at = rows ? rows[i] : row + i;
    const uint64_t logical_row = static_cast<uint64_t>(mask.row0) + static_cast<uint64_t>(at);
    Bits* out = block + i * ld;
    const auto keep_block = [&](int64_t j, const uint16_t* lanes, int64_t columns) {
      keep(out + j, out + j, lanes, columns, 1, mask.threshold);
    };
    if (K >= kLanesPerCounter * kRowCounters) {
      for_lanes<kRowCounters>(K, logical_row, mask.col0 + col, mask, keep_block);
    } else {
      for_lanes<kBlockCounters>(K, logical_row, mask.col0 + col, mask, keep_block);
    }
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
