// The LoRA linear layer on the CPU: products with a low-rank tail, and the skinny reductions.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "four_bit.h"
#include "matrix.h"

namespace lora_kernels {

// C is what is multiplied: float, or BFloat16 where the rows are bfloat16.

// Rows with unit stride, whose inner axis is even for bfloat16 (zeros at its end if need be).
template <typename C>
struct Rows {
  const C* data;
  int64_t M, K;
  int64_t ld;
};

// out = x as Rows, contiguous [M, ld], by all threads.
template <typename C>
void copy_all_rows(const ConstMatrix& x, C* out, int64_t ld);

// All panels of b [K, N] side by side, by all threads.
template <typename C>
void pack(const ConstMatrix& b, C* packed);

// out [N, r, E] = in [E, N, r], by all threads: B of experts as PEFT stores it; and the reverse.
template <typename T>
void experts_last(const T* in, int64_t E, int64_t N, int64_t r, T* out);
template <typename T>
void experts_first(const T* in, int64_t E, int64_t N, int64_t r, T* out);

// Whether packed holds b's values at some 64 places: a weight that was written behind its owner's
// back (Tensor.data leaves no trace) differs nearly everywhere.
template <typename C>
bool is_packed(const ConstMatrix& b, const C* packed);

// s = scale (mask * x) a^T, rounded once: x [M, K], a [r, K], row i of the result to row i of s, or
// to row rows[i]. The same values go to s_rows [M, padded(r)] for the tail, unless it is null.
template <typename C>
struct Shrink {
  Rows<C> x;
  ConstMatrix a;
  float scale;
  const DropoutMask* mask;  // of x, or null
  Matrix s;                 // of C; data may be null
  const int32_t* rows;      // or null
  C* s_rows;                // or null
  // [r], in place of scale: adapters of several projections one over the other. Or null.
  const float* scales = nullptr;
  const C* packed = nullptr;  // a^T in panels; null: packed on the way
};

// Several of them at once; empty ones among them do nothing.
template <typename C>
void shrink(const Shrink<C>* jobs, int64_t count);

// What a slice of an adapter adds to some columns of a product: mask * (s b).
template <typename C>
struct Tail {
  Rows<C> s;                  // [rows, r]
  ConstMatrix b;              // [r, columns]
  int64_t column;             // of the product, where those of b begin
  const DropoutMask* mask;    // of the product [M, N], or null
  const C* packed = nullptr;  // b in panels, for a column that begins one; null: packed on the way
};

// Rows [first, first + rows) of a product, which use one adapter.
template <typename C>
struct TailedRows {
  int64_t first, rows;
  const Tail<C>* tails;
  int64_t count;
};

// Another product of the same size, which is added to x w.
template <typename C>
struct Factors {
  Rows<C> x;
  ConstMatrix w;
  const C* packed;  // as in TailProduct
};

// y = out_scale (x w + tails) + bias, or y += tails, in one pass over tiles with one rounding.
template <typename C>
struct TailProduct {
  Rows<C> x;                      // [M, K]; K = 0: the tails alone
  ConstMatrix w;                  // [K, N]
  const C* packed;                // w in panels; null: packed on the way, each once a thread
  const TailedRows<C>* segments;  // in the order of their rows; other rows have no tail
  int64_t count;
  const int32_t* rows;     // of y, the row of each row of x; null: the same
  const int64_t* logical;  // of the masks, likewise
  const float* out_scale;  // [N], or null
  const float* bias;       // [N], or null
  Matrix y;                // [M, N]
  bool add;
  const Factors<C>* others = nullptr;
  int64_t other_count = 0;
  const FourBit* four_bit = nullptr;  // instead of w, or null
};

template <typename C>
void tail_product(const TailProduct<C>& p);

// Several of them at once, of any weights; empty ones among them do nothing.
template <typename C>
void tail_products(const TailProduct<C>* products, int64_t count);

// out = t (mask * x) for the transposed tails t [R, M] and x [M, K], a reduction over M; R is
// small. Row `ones` of t, if there is one, is all ones, so that its product is the sum over rows.
template <typename C>
struct Reduction {
  ConstMatrix tail;         // [M, r]: D for dA, S for dB
  ConstMatrix x;            // [M, K]: x for dA, dY for dB
  const DropoutMask* mask;  // of x, or null
  Matrix out;               // [r, K] of any strides, or data is null
  Matrix sums;              // [1, K]: the sums over the rows of x, or data is null
};

template <typename C>
void reduce(const Reduction<C>* reductions, int64_t count);

}  // namespace lora_kernels
