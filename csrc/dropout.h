// The dropout mask, keyed on the logical position of an element, and the product x * mask.
#pragma once

#include <cstdint>
#include <type_traits>

namespace lora_kernels {

// Element (i, j) is logical row R = row0 + i and logical column C = col0 + j >= 0. Its random
// number is lane C % 8 (16 bits) of Philox(counter = (R, C / 8, offset), key = seed), and the
// element is kept where lane >= threshold.
struct DropoutMask {
  uint64_t seed;
  uint64_t offset;
  int64_t row0;
  int64_t col0;
  uint32_t threshold;  // 0 (all kept) ... 65535
};

uint32_t dropout_threshold(double dropout_p);

// The unsigned integer as wide as T: dropout copies bits.
template <typename T>
using BitsOf = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

// out[i, j] = x[i, j] where the mask keeps it, else +0, for rows on all of torch's threads.
// Bits is the unsigned integer as wide as the dtype (uint16_t, uint32_t, uint64_t): a kept element
// is copied and a dropped one is zero whatever it was, also NaN or infinity.
template <typename Bits>
void masked(const Bits* x,                         // [M, K]
            Bits* out,                             // [M, K], contiguous
            int64_t M, int64_t K,                  //
            int64_t stride_xm, int64_t stride_xk,  //
            const DropoutMask& mask);

// The same in place on a block of such a matrix, whose first element is (row, col) of the whole. If
// `rows` are given, they are the rows of the whole that the block's rows are.
template <typename Bits>
void drop(Bits* block,  // [M, K], rows ld apart
          int64_t M, int64_t K, int64_t ld, int64_t row, int64_t col, const DropoutMask& mask,
          const int64_t* rows = nullptr);

// The same for elements that are not given as bits.
template <typename T>
void drop_values(T* block, int64_t M, int64_t K, int64_t ld, int64_t row, int64_t col,
                 const DropoutMask& mask, const int64_t* rows = nullptr) {
  drop(reinterpret_cast<BitsOf<T>*>(block), M, K, ld, row, col, mask, rows);
}

}  // namespace lora_kernels
