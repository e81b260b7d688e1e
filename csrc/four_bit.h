// Four-bit weights (NF4, FP4) where bitsandbytes put them: spec/four_bit.py says what the bytes
// mean.
#pragma once

#include <bit>
#include <cstdint>

#include "matrix.h"

namespace lora_kernels {

// A weight of `rows` rows of `cols` values, flat row by row: two values a byte, the first in the
// high half; `block` values share an absmax.
struct FourBit {
  const uint8_t* data;
  int64_t rows, cols;
  bool inner;         // whether its columns are the axis that the product sums over
  int64_t first;      // of its rows in what is stored: an expert's lie among those of all
  int64_t block;      // a power of two
  const float* code;  // [16]
  const float* absmax;
  // With double quantisation instead of absmax: code8[absmax8[i]] * outer[i / 256] + offset.
  const uint8_t* absmax8;
  const float *code8, *outer;
  float offset;

  // As the product's right-hand operand.
  int64_t inner_size() const { return inner ? cols : rows; }
  int64_t columns() const { return inner ? rows : cols; }

  // `count` rows from number `row` on. A block may begin before them.
  FourBit part(int64_t row, int64_t count) const {
    FourBit some = *this;
    some.first = first + row;
    some.rows = count;
    return some;
  }
};

inline int shift_of(const FourBit& w) { return std::countr_zero(static_cast<uint64_t>(w.block)); }

// The scales of `count` blocks from `first` on.
void scales_of(const FourBit& w, int64_t first, int64_t count, float* out);

// Asks for the bytes of columns [j, end) of `count` rows, or as many as there are: the machine does
// not see streams that end with every stretch.
void ask_for(const FourBit& w, int64_t row, int64_t count, int64_t j, int64_t end);

// Rows [i0, i1), columns [j0, j1) of w as out[i - i0][ld]: code times absmax in float32, rounded
// once to C. Out is C, or float for the same values wider.
template <typename C, typename Out>
void decode(const FourBit& w, int64_t i0, int64_t i1, int64_t j0, int64_t j1, Out* out, int64_t ld);

// All of w, contiguous, by all threads.
template <typename C>
void decode_all(const FourBit& w, C* out);

// pack_panel of the decoded weight.
template <typename C>
void pack_panel(const FourBit& w, int64_t k0, int64_t k1, int64_t n0, C* panel);

// Whether a product of M rows decodes w in registers: few rows, whole blocks in each row of w.
template <typename C>
bool decodes_in_registers(int64_t M, const FourBit& w);

// Elements of the rows of such a product in the order in which its nibbles come, and these rows.
template <typename C>
void arrange_rows(int64_t M, int64_t K, const C* x, int64_t ld, C* out);

// c [M, kPanel] += x w for columns [n, n + cols) of the product, x arranged, of [M, K].
template <typename C>
void product_of_few(int64_t M, int64_t cols, const C* arranged, const FourBit& w, int64_t n,
                    float* c);

// Whether a product of M rows multiplies rows of w as they are decoded, along the inner axis: what
// a panel of them would cost, transposed, pays for itself on more rows.
template <typename C>
bool multiplies_along_rows(int64_t M, const FourBit& w);

// Whether it does so with rows of x arranged as the nibbles of w come: whole blocks in each row of
// w.
template <typename C>
bool takes_nibbles(int64_t M, const FourBit& w);

// The rows of such a product, [M, K].
template <typename C>
void arrange_along_rows(int64_t M, int64_t K, const C* x, int64_t ld, C* out);

// c [M, kPanel] += x w for columns [n, n + cols) of the product.
template <typename C>
void product_along_rows(int64_t M, int64_t cols, const C* x, int64_t ld, bool arranged,
                        const FourBit& w, int64_t n, float* c);

}  // namespace lora_kernels
