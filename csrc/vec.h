// One vector register of floats per instruction set, in the compilers' own vector types: the same
// lines are AVX-512, AVX2, SSE2 or NEON by the flags that they are compiled with.
#pragma once

#include <c10/util/BFloat16.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

namespace lora_kernels {

using c10::BFloat16;

// What fits the vector registers at once.
struct Registers {
  int lanes;  // floats of one
  // Of a product's tile: vectors of columns, the most rows, and accumulators, which with a vector
  // of b for each column and one of a fill the register file.
  int columns, rows, accumulators;
  int counters;  // vectors of Philox counters
};

#if defined(__AVX512F__)
constexpr Registers kRegisters = {
    .lanes = 16, .columns = 4, .rows = 12, .accumulators = 24, .counters = 4};
#elif defined(__AVX2__)
constexpr Registers kRegisters = {
    .lanes = 8, .columns = 2, .rows = 6, .accumulators = 12, .counters = 2};
#else
constexpr Registers kRegisters = {
    .lanes = 4, .columns = 2, .rows = 6, .accumulators = 12, .counters = 2};
#endif

constexpr int kLanes = kRegisters.lanes;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(4 * kLanes)));
typedef uint16_t NarrowHalfWords __attribute__((vector_size(2 * kLanes)));

template <typename V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <typename V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof(V));
}

// value - 0 is value, minus zero included, and compilers know it.
inline Vec broadcast(float value) { return value - Vec{}; }

// A bfloat16 is the upper half of a float, so that a pair of them in one word gives both by a shift
// and a mask.
inline Vec lower_bfloat16(Words pairs) { return (Vec)(pairs << 16); }
inline Vec upper_bfloat16(Words pairs) { return (Vec)(pairs & 0xFFFF0000u); }

// Value kUpper of a pair of bfloat16 in every lane. With AVX2 a shift takes a port of the products,
// which the scalar way does not (Emerald Rapids: 1.1 of the time); with AVX-512 it takes 0.9.
template <int kUpper>
inline Vec broadcast_of_pair(const BFloat16* pair) {
#if defined(__AVX512F__)
  uint32_t word;
  std::memcpy(&word, pair, sizeof(word));
  const Words words = word - Words{};
  return kUpper ? upper_bfloat16(words) : lower_bfloat16(words);
#else
  return broadcast(static_cast<float>(pair[kUpper]));
#endif
}

// Each float rounded to nearest even, its bfloat16 in the low half; every NaN becomes 0x7FC0, as
// torch has it.
inline Words bfloat16_bits(Vec v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = (Words)(v != v);
  return (rounded & ~nan) | (nan & 0x7FC0u);
}

inline void store_bfloat16(BFloat16* to, Vec v) {
  store(to, __builtin_convertvector(bfloat16_bits(v), NarrowHalfWords));
}

namespace detail {

template <int kOffset, int... i>
inline Words interleave(Words a, Words b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (kOffset + i / 2 + (i % 2) * kLanes)...);
}

template <int kOffset, int... i>
inline Words interleave(HalfWords a, HalfWords b, std::integer_sequence<int, i...>) {
  return (Words)__builtin_shufflevector(a, b, (kOffset + i / 2 + (i % 2) * 2 * kLanes)...);
}

template <int... i, typename Part>
inline auto join(Part a, Part b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, i...);
}

}  // namespace detail

// Half and a quarter of the words of a vector, and the whole of them, in order.
typedef uint32_t HalfOfWords __attribute__((vector_size(2 * kLanes)));
typedef uint32_t QuarterOfWords __attribute__((vector_size(kLanes)));

inline Words join(const HalfOfWords (&parts)[2]) {
  return detail::join(parts[0], parts[1], std::make_integer_sequence<int, kLanes>{});
}

inline Words join(const QuarterOfWords (&parts)[4]) {
  using Half = std::make_integer_sequence<int, kLanes / 2>;
  return join({(HalfOfWords)detail::join(parts[0], parts[1], Half{}),
               (HalfOfWords)detail::join(parts[2], parts[3], Half{})});
}

// The pairs (a[j], b[j]) in order, over two vectors.
inline void interleave(HalfWords a, HalfWords b, Words (&pairs)[2]) {
  using Indices = std::make_integer_sequence<int, 2 * kLanes>;
  pairs[0] = detail::interleave<0>(a, b, Indices{});
  pairs[1] = detail::interleave<kLanes>(a, b, Indices{});
}

// rows[i][j] <-> rows[j][i]: log2(kLanes) rounds, each of which interleaves row i with row
// i + kLanes / 2.
inline void transpose(Words (&rows)[kLanes]) {
  using Indices = std::make_integer_sequence<int, kLanes>;
  constexpr int kHalf = kLanes / 2;
#pragma GCC unroll 4
  for (int round = 1; round < kLanes; round *= 2) {
    Words next[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = detail::interleave<0>(rows[i], rows[i + kHalf], Indices{});
      next[2 * i + 1] = detail::interleave<kHalf>(rows[i], rows[i + kHalf], Indices{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

}  // namespace lora_kernels
