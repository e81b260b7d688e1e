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
// Neighbouring counters of a row, and rows, whose lanes are made at once: enough vectors to hide
// the ten dependent multiplications of one. A block of a matrix may be narrow.
constexpr int kRowCounters = 32;
constexpr int kBlockCounters = 8, kBlockRows = 4;
constexpr int kChains = kRegisters.counters;

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

// The lanes of kCounters neighbouring counters of each of kRows rows, in the order of the columns.
template <int kCounters, int kRows>
void random_lanes(uint16_t (&lanes)[kRows][kLanesPerCounter * kCounters],
                  const uint64_t (&rows)[kRows], uint64_t first_group, const DropoutMask& mask) {
  constexpr int kWidth = sizeof(PhiloxLanes) / sizeof(uint64_t);
  constexpr int kVectors = kCounters / kWidth;  // of a row
  static_assert(kRows * kVectors % kChains == 0);
  const PhiloxLanes zero = {};
  const PhiloxLanes groups = first_group + counting(std::make_integer_sequence<int, kWidth>{});

  for (int begin = 0; begin < kRows * kVectors; begin += kChains) {
    PhiloxWords chains[kChains];
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      const int row = (begin + i) / kVectors, vector = (begin + i) % kVectors;
      chains[i] = {zero + rows[row], groups + static_cast<uint64_t>(vector * kWidth),
                   zero + mask.offset, zero + (mask.offset >> 32)};
    }
    philox4x32_10(chains, static_cast<uint32_t>(mask.seed), static_cast<uint32_t>(mask.seed >> 32));
    // A counter's four words side by side are its eight lanes, low half first, as little-endian
    // memory has them.
    static_assert(std::endian::native == std::endian::little);
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      const PhiloxWords& c = chains[i];
      const PhiloxLanes words01 = (c.c0 & 0xFFFFFFFFu) | (c.c1 << 32);
      const PhiloxLanes words23 = (c.c2 & 0xFFFFFFFFu) | (c.c3 << 32);
      const auto [low, high] =
          interleave(words01, words23, std::make_integer_sequence<int, kWidth>{});
      const int row = (begin + i) / kVectors, vector = (begin + i) % kVectors;
      uint16_t* to = lanes[row] + vector * kWidth * kLanesPerCounter;
      std::memcpy(to, &low, sizeof(low));
      std::memcpy(to + kWidth * kLanesPerCounter / 2, &high, sizeof(high));
    }
  }
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

// Calls keep_block(i, first column, lanes, columns) for the columns of the first `count` of some
// rows, a block at a time.
template <int kCounters, int kRows, typename KeepBlock>
void for_lanes(int64_t K, const uint64_t (&rows)[kRows], int64_t count, int64_t col,
               const DropoutMask& mask, KeepBlock keep_block) {
  constexpr int64_t kColumns = kLanesPerCounter * kCounters;
  alignas(64) uint16_t lanes[kRows][kColumns];
  // col may lie inside a counter's eight lanes: the first block then gives up the lanes before it.
  uint64_t group = static_cast<uint64_t>(col) / kLanesPerCounter;
  int64_t skip = col % kLanesPerCounter;
  for (int64_t j = 0; j < K;) {
    random_lanes<kCounters>(lanes, rows, group, mask);
    const int64_t columns = std::min(kColumns - skip, K - j);
    for (int64_t i = 0; i < count; ++i) keep_block(i, j, lanes[i] + skip, columns);
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
      const uint64_t row[] = {static_cast<uint64_t>(mask.row0) + static_cast<uint64_t>(i)};
      const Bits* from = x + i * stride_xm;
      for_lanes<kRowCounters>(K, row, 1, mask.col0, mask,
                              [&](int64_t, int64_t j, const uint16_t* lanes, int64_t columns) {
                                Bits* to = out + i * K + j;
                                if (stride_xk == 1) {
                                  keep(from + j, to, lanes, columns, 1, mask.threshold);
                                } else {
                                  keep(from + j * stride_xk, to, lanes, columns, stride_xk,
                                       mask.threshold);
                                }
                              });
    }
  });
}

template <typename Bits>
void drop(Bits* block, int64_t M, int64_t K, int64_t ld, int64_t row, int64_t col,
          const DropoutMask& mask, const int64_t* rows) {
  const auto logical_row = [&](int64_t i) {
    return static_cast<uint64_t>(mask.row0) + static_cast<uint64_t>(rows ? rows[i] : row + i);
  };
  const bool wide = K >= kLanesPerCounter * kRowCounters;
  for (int64_t first = 0; first < M; first += wide ? 1 : kBlockRows) {
    const auto keep_block = [&](int64_t i, int64_t j, const uint16_t* lanes, int64_t columns) {
      Bits* out = block + (first + i) * ld + j;
      keep(out, out, lanes, columns, 1, mask.threshold);
    };
    if (wide) {
      for_lanes<kRowCounters>(K, {logical_row(first)}, 1, mask.col0 + col, mask, keep_block);
      continue;
    }
    uint64_t several[kBlockRows];
    for (int64_t i = 0; i < kBlockRows; ++i) several[i] = logical_row(std::min(first + i, M - 1));
    for_lanes<kBlockCounters>(K, several, std::min<int64_t>(kBlockRows, M - first), mask.col0 + col,
                              mask, keep_block);
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
