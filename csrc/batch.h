// What the boundary of the segmented operators makes of its tensors: segments, their adapters, and
// the rows that belong to them.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

#include "bindings.h"
#include "panel.h"
#include "segmented.h"

namespace lora_kernels {

using at::TensorList;

// The slots of SegmentTable.tensors().
inline int64_t slots_of(TensorList table) {
  TORCH_CHECK_VALUE(table.size() == 8, "table must be SegmentTable.tensors(), 8 tensors, got ",
                    table.size());
  return table[1].size(0);
}

// SegmentTable.tensors(), read where it lies: the segments of a batch of M rows.
//
// SegmentTable checks values and makes a right schedule, but a table may come from elsewhere or
// have been written to. So every call checks what would else read or write beside a tensor or leave
// a row unwritten: each of the first M places of `order` holds a row below M, under the slot that
// slot_of_row names, and rows rise within a slot. Then no row has two places. This costs a few
// comparisons a row, of ints that the call reads anyway, and no memory.
struct Batch {
  std::vector<Segment> segments;
  const int32_t* order;  // [M]; those without an adapter come last
  const int64_t* logical_row;
  int64_t M;
  int64_t live;  // rows with an adapter
  int64_t slots;

  Batch(TensorList table, int64_t M, int64_t r_max) : M(M), slots(slots_of(table)) {
    constexpr at::ScalarType kTypes[] = {at::kInt, at::kInt, at::kFloat, at::kLong,
                                         at::kInt, at::kInt, at::kInt,   at::kInt};
    for (size_t i = 0; i < table.size(); ++i) {
      TORCH_CHECK_VALUE(table[i].is_cpu() && table[i].is_contiguous() && table[i].dim() == 1,
                        "the table must hold contiguous vectors on the CPU");
      TORCH_CHECK_TYPE(table[i].scalar_type() == kTypes[i], "vector ", i, " of the table must be ",
                       kTypes[i], ", got ", table[i].scalar_type());
    }
    const int64_t room = table[0].size(0);
    TORCH_CHECK_VALUE(table[2].size(0) == slots && table[5].size(0) == slots + 1 &&
                          table[4].size(0) == room && table[3].size(0) == room,
                      "the vectors of the table do not fit each other");
    TORCH_CHECK_VALUE(M <= room, "x has ", M, " rows and the table has room for ", room);
    const int32_t* slot_of_row = table[0].const_data_ptr<int32_t>();
    const int32_t* ranks = table[1].const_data_ptr<int32_t>();
    const float* scales = table[2].const_data_ptr<float>();
    logical_row = table[3].const_data_ptr<int64_t>();
    order = table[4].const_data_ptr<int32_t>();
    const int32_t* start = table[5].const_data_ptr<int32_t>();

    // Of places [begin, end) of the order, where rows of certain slots belong.
    const auto check_rows = [&](int64_t begin, int64_t end, auto belongs) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = order[i];
        TORCH_CHECK_VALUE(row >= 0 && row < M, "row ", row,
                          " of the table's order is out of range: x has ", M, " rows");
        TORCH_CHECK_VALUE(belongs(slot_of_row[row]) && (i == begin || row > order[i - 1]), "row ",
                          row, " has two places in the table's order, or one of another slot");
      }
    };
    TORCH_CHECK_VALUE(start[0] == 0, "start_of_slot of slot 0 does not fit the table's order");
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t begin = start[slot], end = start[slot + 1], rank = ranks[slot];
      if (begin == end) continue;
      TORCH_CHECK_VALUE(begin < end && end <= room, "start_of_slot of slot ", slot,
                        " does not fit the table's order");
      TORCH_CHECK_VALUE(rank >= 0 && rank <= r_max, "slot ", slot, " has rank ", rank,
                        " and the adapters have room for ", r_max);
      check_rows(begin, end, [&](int64_t own) { return own == slot; });
      if (rank > 0) segments.push_back({slot, begin, end - begin, rank, scales[slot]});
    }
    live = start[slots];
    check_rows(live, M, [&](int64_t own) {
      return own < 0 || (own < slots && start[own] == start[own + 1]);
    });
  }

  // The mask's rows in the order of the segments; not read without a mask.
  std::vector<int64_t> logical(bool masked) const {
    std::vector<int64_t> rows(masked ? M : 0);
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = logical_row[order[i]];
    return rows;
  }
};

// Part of t, from element number `first` on.
template <typename Void>
MatrixOf<Void> part_from(const Tensor& t, int64_t first, int64_t rows, int64_t cols,
                         int64_t stride_row, int64_t stride_col) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  auto* data = static_cast<Byte*>(data_of<Void>(t)) + first * t.element_size();
  return {data, *kind_or_none(t.scalar_type()), rows, cols, stride_row, stride_col};
}

// The first `cols` columns of `rows` rows of stack[slot], from `row` on.
template <typename Void = const void>
MatrixOf<Void> part(const Tensor& stack, int64_t slot, int64_t row, int64_t rows, int64_t cols) {
  const int64_t first = slot * stack.stride(0) + row * stack.stride(1);
  return part_from<Void>(stack, first, rows, cols, stack.stride(1), stack.stride(2));
}

// A [rank, K] of one segment and slice.
template <typename Void = const void>
MatrixOf<Void> part_of_a(const std::vector<Tensor>& stacks, int64_t packed_slices,
                         const Segment& segment, int64_t slice) {
  const Tensor& stack = stacks[packed_slices ? 0 : slice];
  const int64_t row = packed_slices ? slice * segment.rank : 0;
  return part<Void>(stack, segment.slot, row, segment.rank, stack.size(2));
}

// The right-hand side of a slice's product, and its panels if there are any.
template <typename C>
struct Right {
  ConstMatrix matrix;
  const C* packed = nullptr;
};

// Panels of a stack's matrices, packed before for ranks [S]: one tensor [S, .] a slice.
struct Panels {
  std::vector<Tensor> tensors;
  const int32_t* ranks = nullptr;

  // Of the right-hand side [K, N] of a segment, whose columns begin at `column` of its product.
  template <typename C>
  const C* of(const Segment& segment, int64_t slice, int64_t K, int64_t N, int64_t column) const {
    if (tensors.empty() || ranks[segment.slot] != segment.rank || column % kPanel != 0) {
      return nullptr;
    }
    const Tensor& t = tensors[slice];
    TORCH_CHECK_VALUE(
        t.size(1) >= packed_size<C>(K, N) && t.scalar_type() == c10::CppTypeToScalarType<C>::value,
        "panels ", t.sizes(), " do not hold [", K, ", ", N, "]");
    return t.const_data_ptr<C>() + segment.slot * t.stride(0);
  }
};

// The adapters of a call: one stack a slice, or all slices in one, packed by live rank.
struct Stacks {
  std::vector<Tensor> tensors;
  int64_t packed_slices;
  Panels panels;

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
  // Of the slices of B.
  std::vector<int64_t> widths() const {
    std::vector<int64_t> all;
    for (const Tensor& t : tensors) all.push_back(t.size(1));
    return all;
  }

  ConstMatrix a(const Segment& segment, int64_t slice) const {
    return part_of_a(tensors, packed_slices, segment, slice);
  }
  // B [N, rank].
  ConstMatrix b(const Segment& segment, int64_t slice) const {
    return part(tensors[slice], segment.slot, 0, tensors[slice].size(1), segment.rank);
  }
};

inline DropoutMask of_slice(DropoutMask mask, int64_t slice) {
  mask.offset += static_cast<uint64_t>(slice);
  return mask;
}

// The rows of a batch in the order of its segments, as operands of a product: one copy for all
// slices where none has a mask; or x itself, if its rows lie in that order.
template <typename C>
struct Gathered {
  std::vector<Tensor> copies;
  Rows<C> whole{};              // every column without a mask, where it is asked for
  std::vector<Rows<C>> slices;  // columns [begin[j], end[j])

  // With `base`, of the rows without an adapter too.
  Gathered(const ConstMatrix& x, const Batch& batch, const std::vector<int64_t>& begin,
           const std::vector<int64_t>& end, const std::optional<DropoutMask>& mask,
           const std::vector<int64_t>& logical, const at::TensorOptions& options, bool base) {
    if (base || !mask) whole = copy(x, batch, base ? x.rows : batch.live, 0, x.cols, {}, options);
    for (size_t j = 0; j < begin.size(); ++j) {
      const int64_t K = end[j] - begin[j], last = begin[j] + padded<C>(K);
      // A pair at the end of a slice must not hold what follows the slice, but zeros may follow x.
      if (!mask && (last == end[j] || (end[j] == x.cols && last <= padded<C>(x.cols)))) {
        slices.push_back({whole.data + begin[j], batch.live, K, whole.ld});
        continue;
      }
      std::optional<DropoutMask> own;
      if (mask) own = of_slice(*mask, j);
      slices.push_back(copy(x, batch, batch.live, begin[j], end[j], own, options, logical.data()));
    }
  }

  Rows<C> of(const Segment& segment, int64_t slice) const {
    const Rows<C>& rows = slices[slice];
    return {rows.data + segment.first * rows.ld, segment.rows, rows.K, rows.ld};
  }

 private:
  Rows<C> copy(const ConstMatrix& x, const Batch& batch, int64_t count, int64_t c0, int64_t c1,
               const std::optional<DropoutMask>& mask, const at::TensorOptions& options,
               const int64_t* logical = nullptr) {
    const int64_t K = c1 - c0, ld = padded<C>(K);
    if (!mask && c0 == 0 && c1 == x.cols && are_rows<C>(x) && in_a_row(batch.order, count)) {
      const int64_t first = count > 0 ? batch.order[0] : 0;
      return {static_cast<const C*>(x.data) + first * x.stride_row, count, K, x.stride_row};
    }
    copies.push_back(at::empty({count, ld}, options.dtype(c10::CppTypeToScalarType<C>::value)));
    C* data = copies.back().template mutable_data_ptr<C>();
    gather_rows(x, batch.order, count, c0, c1, pointer(mask), logical, data, ld);
    return {data, count, K, ld};
  }

  static bool in_a_row(const int32_t* order, int64_t count) {
    for (int64_t i = 1; i < count; ++i) {
      if (order[i] != order[0] + i) return false;
    }
    return true;
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
    s = at::zeros({M, n, r_max}, options.dtype(c10::CppTypeToScalarType<C>::value));
    reserve(batch, options);
    std::vector<Shrink<C>> jobs;
    for (size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment& segment = batch.segments[i];
      for (int64_t j = 0; j < n; ++j) {
        const Right<C> right = operand(segment, j);
        jobs.push_back({x.of(segment, j), right.matrix, static_cast<float>(segment.scale / keep),
                        nullptr, slice<void>(j, segment.rank), batch.order + segment.first,
                        live.template mutable_data_ptr<C>() + first[i * n + j], nullptr,
                        right.packed});
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
        gather_rows<C>(slice<const void>(j, segment.rank), batch.order + segment.first,
                       segment.rows, 0, segment.rank, nullptr, nullptr, data + first[i * n + j],
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
  template <typename Void>
  MatrixOf<Void> slice(int64_t j, int64_t rank) const {
    return part_from<Void>(s, j * s.stride(1), s.size(0), rank, s.stride(0), s.stride(2));
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

// The tails of a batch's segments: of each slice, S or D times `operand(segment, slice)` in the
// columns from columns[slice] on.
template <typename C>
struct Tails {
  std::vector<Tail<C>> tails;
  std::vector<TailedRows<C>> segments;

  template <typename Operand>
  Tails(const Batch& batch, const Shrunk<C>& s, Operand operand,
        const std::vector<int64_t>& columns, const std::vector<DropoutMask>& masks) {
    tails.reserve(batch.segments.size() * s.n);
    for (size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment& segment = batch.segments[i];
      segments.push_back({segment.first, segment.rows, tails.data() + tails.size(), s.n});
      for (int64_t j = 0; j < s.n; ++j) {
        const Right<C> right = operand(segment, j);
        tails.push_back({s.rows(batch, i, j), right.matrix, columns[j],
                         masks.empty() ? nullptr : &masks[j], right.packed});
      }
    }
  }
};

}  // namespace lora_kernels
