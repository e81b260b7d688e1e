// Batches that mix adapters: rows grouped by adapter, each group by the kernels of one.
#pragma once

#include <cstdint>

#include "dropout.h"
#include "linear.h"
#include "matrix.h"

namespace lora_kernels {

// Rows order[first] to order[first + rows) of a batch, which use one adapter.
struct Segment {
  int64_t slot;
  int64_t first, rows;
  int64_t rank;
  float scale;
};

// A SegmentTable's schedule by a counting sort: see its docstring for what the vectors hold.
void schedule(int64_t M, int64_t slots, int64_t blocks, int64_t block_rows,
              const int32_t* slot_of_row,                  // [M], -1 to slots - 1
              const int32_t* rank_of_slot,                 // [slots]
              int32_t* order,                              // [M]
              int32_t* start_of_slot,                      // [slots + 1]
              int32_t* block_slot, int32_t* block_start);  // [blocks]

// out[i] = columns [c0, c1) of row order[i] of x, as rows of a product, by all threads; with the
// mask applied whose rows are logical[i] (of the gathered rows, not of x).
template <typename C>
void gather_rows(const Matrix& x, const int32_t* order, int64_t count, int64_t c0, int64_t c1,
                 const DropoutMask* mask, const int64_t* logical, C* out, int64_t ld);

// What one slice adds to the result: mask * (s b).
template <typename C>
struct Contribution {
  Rows<C> s;                // [rows, r]
  Matrix b;                 // [r, N]
  const DropoutMask* mask;  // of [rows, N], or null
};

// Row rows[i] of y = (or +=) the sum of the contributions to row i, with one rounding.
template <typename C>
struct Expand {
  const Contribution<C>* contributions;
  int64_t count;
  const int32_t* rows;
  const int64_t* logical;  // the mask's row of each row, or null without masks
  Matrix y;                // [M, N]
  bool add;
};

template <typename C>
void expand(const Expand<C>* jobs, int64_t count);

}  // namespace lora_kernels
