// What the boundary of the segmented operators makes of its tensors: segments, their adapters, and
// the rows that belong to them.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "bindings.h"
#include "segmented.h"

namespace lora_kernels {

using at::TensorList;

// The slots of SegmentTable.tensors().
inline int64_t slots_of(TensorList table) {
  TORCH_CHECK_VALUE(table.size() == 8, "table must be SegmentTable.tensors(), 8 tensors, got ",
                    table.size());
  return table[1].size(0);
}

// SegmentTable.tensors(), read: the segments of a batch, and the rows grouped by them.
struct Batch {
  std::vector<Segment> segments;
  const int32_t* order;
  const int64_t* logical_row;
  int64_t live = 0;  // rows with an adapter
  int64_t slots;

  Batch(TensorList table, int64_t M, int64_t r_max) {
    slots = slots_of(table);
    for (const Tensor& t : table) {
      TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous() && t.dim() == 1,
                        "the table must hold contiguous vectors on the CPU");
    }
    TORCH_CHECK_VALUE(table[2].size(0) == slots && table[5].size(0) == slots + 1 &&
                          table[4].size(0) == table[0].size(0) &&
                          table[3].size(0) == table[0].size(0),
                      "the vectors of the table do not fit each other");
    const int32_t* ranks = table[1].const_data_ptr<int32_t>();
    const float* scales = table[2].const_data_ptr<float>();
    logical_row = table[3].const_data_ptr<int64_t>();
    order = table[4].const_data_ptr<int32_t>();
    const int32_t* start = table[5].const_data_ptr<int32_t>();
    live = start[slots];
    TORCH_CHECK_VALUE(live <= table[4].size(0), "the table's start_of_slot ends beyond its order");
    for (int64_t i = 0; i < live; ++i) {
      TORCH_CHECK_VALUE(order[i] >= 0 && order[i] < M, "row ", order[i],
                        " of the table has an adapter and x has ", M, " rows");
    }
    for (int64_t slot = 0; slot < slots; ++slot) {
      if (start[slot] == start[slot + 1]) continue;
      TORCH_CHECK_VALUE(ranks[slot] >= 0 && ranks[slot] <= r_max, "slot ", slot, " has rank ",
                        ranks[slot], " and the adapters have room for ", r_max);
      segments.push_back(
          {slot, start[slot], start[slot + 1] - start[slot], ranks[slot], scales[slot]});
    }
  }

  // The mask's rows in the order of the segments; without a mask nobody asks for them.
  std::vector<int64_t> logical(bool masked) const {
    std::vector<int64_t> rows(live);
    for (int64_t i = 0; masked && i < live; ++i) rows[i] = logical_row[order[i]];
    return rows;
  }
};

inline Matrix part(const Tensor& stack, int64_t slot, int64_t row, int64_t rows, int64_t cols) {
  const auto kind = kind_or_none(stack.scalar_type());
  const int64_t size = stack.element_size();
  char* data = static_cast<char*>(const_cast<void*>(stack.const_data_ptr()));
  data += (slot * stack.stride(0) + row * stack.stride(1)) * size;
  return {data, *kind, rows, cols, stack.stride(1), stack.stride(2)};
}

// A [rank, K] of one segment and slice.
inline Matrix part_of_a(const std::vector<Tensor>& stacks, int64_t packed_slices,
                        const Segment& segment, int64_t slice) {
  const Tensor& stack = stacks[packed_slices ? 0 : slice];
  const int64_t row = packed_slices ? slice * segment.rank : 0;
  return part(stack, segment.slot, row, segment.rank, stack.size(2));
}

// The adapters of a call: one stack a slice, or all slices in one, packed by live rank.
struct Stacks {
  std::vector<Tensor> tensors;
  int64_t packed_slices;

  Stacks(TensorList given, const char* name, at::ScalarType rows, int64_t slots, int64_t packed)
      : packed_slices(packed) {
    TORCH_CHECK_VALUE(!given.empty() && (packed == 0 || given.size() == 1), name,
                      " must hold a tensor a slice, or one with packed_slices");
    for (const Tensor& t : given) {
      TORCH_CHECK_VALUE(t.dim() == 3 && t.size(0) == slots, name, " must be [", slots,
                        ", ., .], got ", t.sizes());
      TORCH_CHECK_VALUE(t.is_cpu() && t.layout() == at::kStrided, name,
                        " must be a plain CPU tensor");
      tensors.push_back(adapter(t, rows));
      TORCH_CHECK_TYPE(kind_or_none(tensors.back().scalar_type()), name,
                       " must be a floating tensor, got ", t.scalar_type());
    }
  }

  int64_t slices() const { return packed_slices ? packed_slices : tensors.size(); }
  int64_t r_max() const { return tensors[0].size(1) / std::max<int64_t>(1, packed_slices); }
  int64_t cols() const { return tensors[0].size(2); }

  Matrix a(const Segment& segment, int64_t slice) const {
    return part_of_a(tensors, packed_slices, segment, slice);
  }
  // B [N, rank].
  Matrix b(const Segment& segment, int64_t slice) const {
    return part(tensors[slice], segment.slot, 0, tensors[slice].size(1), segment.rank);
  }
};

// Where the columns of each slice begin, and where the last ends.
inline std::vector<int64_t> offsets(const Stacks& b) {
  std::vector<int64_t> first(1, 0);
  for (const Tensor& t : b.tensors) first.push_back(first.back() + t.size(1));
  return first;
}

inline DropoutMask of_slice(DropoutMask mask, int64_t slice) {
  mask.offset += static_cast<uint64_t>(slice);
  return mask;
}

// The rows of a batch in the order of its segments, as operands of a product: one copy for all
// slices, or one each where a mask or the columns differ.
template <typename C>
struct Gathered {
  std::vector<Tensor> copies;
  std::vector<Rows<C>> all;

  Gathered(const Matrix& x, const Batch& batch, const std::vector<int64_t>& begin,
           const std::vector<int64_t>& end, const std::optional<DropoutMask>& mask,
           const std::vector<int64_t>& logical, const at::TensorOptions& options) {
    for (size_t j = 0; j < begin.size(); ++j) {
      if (j > 0 && !mask && begin[j] == begin[0] && end[j] == end[0]) {
        all.push_back(all[0]);
        continue;
      }
      const int64_t K = end[j] - begin[j], ld = padded<C>(K);
      copies.push_back(
          at::empty({batch.live, ld}, options.dtype(c10::CppTypeToScalarType<C>::value)));
      C* data = copies.back().template mutable_data_ptr<C>();
      DropoutMask own;
      if (mask) own = of_slice(*mask, j);
      gather_rows(x, batch.order, batch.live, begin[j], end[j], mask ? &own : nullptr,
                  logical.data(), data, ld);
      all.push_back({data, batch.live, K, ld});
    }
  }

  Rows<C> of(const Segment& segment, int64_t slice) const {
    const Rows<C>& rows = all[slice];
    return {rows.data + segment.first * rows.ld, segment.rows, rows.K, rows.ld};
  }
};

// S or D: [M, n, r_max] for the caller, and its live part as rows of products.
template <typename C>
struct Shrunk {
  Tensor s, live;
  std::vector<int64_t> first;  // of the live rows of segment i, slice j, at i * n + j
  int64_t n;

  template <typename Operand>
  Shrunk(const Batch& batch, const Gathered<C>& x, int64_t M, int64_t slices, int64_t r_max,
         double keep, Operand operand, const at::TensorOptions& options)
      : n(slices) {
    s = at::zeros({M, n, r_max}, options);
    reserve(batch, options);
    std::vector<Shrink<C>> jobs;
    for (size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment& segment = batch.segments[i];
      for (int64_t j = 0; j < n; ++j) {
        jobs.push_back({x.of(segment, j), operand(segment, j),
                        static_cast<float>(segment.scale / keep), nullptr, slice(j, segment.rank),
                        batch.order + segment.first,
                        live.template mutable_data_ptr<C>() + first[i * n + j]});
      }
    }
    shrink(jobs.data(), jobs.size());
  }

  // From an S that was computed before.
  Shrunk(const Batch& batch, const Tensor& given) : s(given), n(given.size(1)) {
    reserve(batch, given.options());
    C* data = live.template mutable_data_ptr<C>();
    for (size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment& segment = batch.segments[i];
      for (int64_t j = 0; j < n; ++j) {
        gather_rows<C>(slice(j, segment.rank), batch.order + segment.first, segment.rows, 0,
                       segment.rank, nullptr, nullptr, data + first[i * n + j],
                       padded<C>(segment.rank));
      }
    }
  }

  Rows<C> rows(const Batch& batch, size_t i, int64_t j) const {
    const Segment& segment = batch.segments[i];
    return {live.const_data_ptr<C>() + first[i * n + j], segment.rows, segment.rank,
            padded<C>(segment.rank)};
  }

 private:
  // S [M, rank] of slice j.
  Matrix slice(int64_t j, int64_t rank) const {
    char* data = static_cast<char*>(const_cast<void*>(s.const_data_ptr()));
    data += j * s.stride(1) * s.element_size();
    return {data, *kind_or_none(s.scalar_type()), s.size(0), rank, s.stride(0), s.stride(2)};
  }

  void reserve(const Batch& batch, const at::TensorOptions& options) {
    int64_t total = 0;
    for (const Segment& segment : batch.segments) {
      for (int64_t j = 0; j < n; ++j) {
        first.push_back(total);
        total += segment.rows * padded<C>(segment.rank);
      }
    }
    live = at::empty({total}, options.dtype(c10::CppTypeToScalarType<C>::value));
  }
};

}  // namespace lora_kernels
