// Batches that mix adapters: rows grouped by adapter, as segments of one product.
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
void gather_rows(const ConstMatrix& x, const int32_t* order, int64_t count, int64_t c0, int64_t c1,
                 const DropoutMask* mask, const int64_t* logical, C* out, int64_t ld);

}  // namespace lora_kernels
