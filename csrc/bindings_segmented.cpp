// The boundary of the segmented operators.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <numeric>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "segmented.h"

namespace lora_kernels {

namespace {

using at::TensorList;

// SegmentTable.tensors(), read: the segments of a batch, and the rows grouped by them.
struct Batch {
  std::vector<Segment> segments;
  const int32_t* order;
  const int64_t* logical_row;
  int64_t live = 0;  // rows with an adapter
  int64_t slots;

  Batch(TensorList table, int64_t M, int64_t r_max) {
    TORCH_CHECK_VALUE(table.size() == 8, "table must be SegmentTable.tensors(), 8 tensors, got ",
                      table.size());
    for (const Tensor& t : table) {
      TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous() && t.dim() == 1,
                        "the table must hold contiguous vectors on the CPU");
    }
    slots = table[1].size(0);
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

  // The logical rows in the order of the segments, and of all of them.
  std::vector<int64_t> logical() const {
    std::vector<int64_t> rows(live);
    for (int64_t i = 0; i < live; ++i) rows[i] = logical_row[order[i]];
    return rows;
  }
};

// Fills the last four of SegmentTable.tensors() from the first two.
void segment_schedule_(TensorList table, int64_t block_rows) {
  TORCH_CHECK_VALUE(table.size() == 8, "table must be SegmentTable.tensors(), 8 tensors, got ",
                    table.size());
  const int64_t M = table[0].size(0), slots = table[1].size(0), blocks = table[6].size(0);
  for (const int i : {0, 1, 4, 5, 6, 7}) {
    TORCH_CHECK_VALUE(table[i].is_cpu() && table[i].is_contiguous() && table[i].dim() == 1 &&
                          table[i].scalar_type() == at::kInt,
                      "the table must hold contiguous int32 vectors on the CPU");
  }
  TORCH_CHECK_VALUE(table[4].size(0) == M && table[5].size(0) == slots + 1 &&
                        table[7].size(0) == blocks &&
                        blocks >= (M + block_rows - 1) / block_rows + std::min(M, slots),
                    "the vectors of the table do not fit each other");
  const int32_t* slot_of_row = table[0].const_data_ptr<int32_t>();
  for (int64_t i = 0; i < M; ++i) {
    TORCH_CHECK_VALUE(slot_of_row[i] >= -1 && slot_of_row[i] < slots, "slot ", slot_of_row[i],
                      " is out of range: the table has ", slots, " slots");
  }
  schedule(M, slots, blocks, block_rows, slot_of_row, table[1].const_data_ptr<int32_t>(),
           table[4].mutable_data_ptr<int32_t>(), table[5].mutable_data_ptr<int32_t>(),
           table[6].mutable_data_ptr<int32_t>(), table[7].mutable_data_ptr<int32_t>());
}

Matrix part(const Tensor& stack, int64_t slot, int64_t row, int64_t rows, int64_t cols) {
  const auto kind = kind_or_none(stack.scalar_type());
  const int64_t size = stack.element_size();
  char* data = static_cast<char*>(const_cast<void*>(stack.const_data_ptr()));
  data += (slot * stack.stride(0) + row * stack.stride(1)) * size;
  return {data, *kind, rows, cols, stack.stride(1), stack.stride(2)};
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

  // A [rank, K] of one segment and slice.
  Matrix a(const Segment& segment, int64_t slice) const {
    const int64_t row = packed_slices ? slice * segment.rank : 0;
    return part(tensors[packed_slices ? 0 : slice], segment.slot, row, segment.rank, cols());
  }
  // B [N, rank].
  Matrix b(const Segment& segment, int64_t slice) const {
    return part(tensors[slice], segment.slot, 0, tensors[slice].size(1), segment.rank);
  }
};

// Where the columns of each slice begin, and where the last ends.
std::vector<int64_t> offsets(const Stacks& b) {
  std::vector<int64_t> first(1, 0);
  for (const Tensor& t : b.tensors) first.push_back(first.back() + t.size(1));
  return first;
}

DropoutMask of_slice(DropoutMask mask, int64_t slice) {
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
        const Matrix to = {s.element_size() * j * r_max + static_cast<char*>(s.mutable_data_ptr()),
                           *kind_or_none(s.scalar_type()),
                           M,
                           segment.rank,
                           n * r_max,
                           1};
        jobs.push_back({x.of(segment, j), operand(segment, j),
                        static_cast<float>(segment.scale / keep), nullptr, to,
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
        const Matrix from = {static_cast<char*>(const_cast<void*>(s.const_data_ptr())) +
                                 s.element_size() * j * s.stride(1),
                             *kind_or_none(s.scalar_type()),
                             s.size(0),
                             segment.rank,
                             s.stride(0),
                             s.stride(2)};
        gather_rows<C>(from, batch.order + segment.first, segment.rows, 0, segment.rank, nullptr,
                       nullptr, data + first[i * n + j], padded<C>(segment.rank));
      }
    }
  }

  Rows<C> rows(const Batch& batch, size_t i, int64_t j) const {
    const Segment& segment = batch.segments[i];
    return {live.const_data_ptr<C>() + first[i * n + j], segment.rows, segment.rank,
            padded<C>(segment.rank)};
  }

 private:
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

Matrix columns_of(const Tensor& y, int64_t begin, int64_t cols) {
  Matrix m = matrix(y, "y");
  m.data = static_cast<char*>(m.data) + begin * m.stride_col * y.element_size();
  m.cols = cols;
  return m;
}

// Rows without an adapter, which no segment writes.
void zero_others(const Batch& batch, const Tensor& y) {
  std::vector<bool> has(y.size(0), false);
  for (int64_t i = 0; i < batch.live; ++i) has[batch.order[i]] = true;
  for (int64_t i = 0; i < y.size(0); ++i) {
    if (!has[i]) y.select(0, i).zero_();
  }
}

// Every slice of every segment into columns of its own: y = or += S B^T.
template <typename C>
void expand_slices(const Batch& batch, const Shrunk<C>& s, const Stacks& b, const Tensor& y,
                   bool add) {
  const std::vector<int64_t> first = offsets(b);
  std::vector<Contribution<C>> contributions;
  std::vector<Expand<C>> jobs;
  contributions.reserve(batch.segments.size() * s.n);
  for (size_t i = 0; i < batch.segments.size(); ++i) {
    const Segment& segment = batch.segments[i];
    for (int64_t j = 0; j < s.n; ++j) {
      contributions.push_back({s.rows(batch, i, j), b.b(segment, j).transposed(), nullptr});
      jobs.push_back({&contributions.back(), 1, batch.order + segment.first, nullptr,
                      columns_of(y, first[j], first[j + 1] - first[j]), add});
    }
  }
  expand(jobs.data(), jobs.size());
  if (!add) zero_others(batch, y);
}

std::vector<int64_t> repeated(int64_t value, int64_t count) {
  return std::vector<int64_t>(count, value);
}

template <typename C>
Shrunk<C> shrink_rows(const Tensor& x, const Stacks& a, const Batch& batch,
                      const std::optional<DropoutMask>& mask, double dropout_p) {
  const std::vector<int64_t> logical = batch.logical();
  const Gathered<C> rows(matrix(x, "x"), batch, repeated(0, a.slices()),
                         repeated(x.size(1), a.slices()), mask, logical, x.options());
  return Shrunk<C>(
      batch, rows, x.size(0), a.slices(), a.r_max(), 1.0 - dropout_p,
      [&](const Segment& segment, int64_t j) { return a.a(segment, j); }, x.options());
}

void check_a(const Tensor& x, const Stacks& a) {
  for (const Tensor& t : a.tensors) {
    TORCH_CHECK_VALUE(t.size(2) == x.size(1) && t.size(1) == a.tensors[0].size(1) &&
                          t.size(1) % a.slices() * a.packed_slices == 0,
                      "lora_a ", t.sizes(), " does not fit x ", x.sizes());
  }
}

void check_b(const Stacks& b, int64_t slices, int64_t r_max) {
  TORCH_CHECK_VALUE(b.slices() == slices, "lora_a has ", slices, " slices and lora_b ", b.slices());
  for (const Tensor& t : b.tensors) {
    TORCH_CHECK_VALUE(t.size(2) == r_max, "lora_b must be [S, N, ", r_max, "], got ", t.sizes());
  }
}

Tensor segmented_shrink(const Tensor& x, TensorList lora_a, TensorList table, int64_t packed_slices,
                        const OptionalTensor& rng, double dropout_p) {
  at::AutoDispatchBelowADInplaceOrView guard;
  matrix(x, "x");
  const Stacks a(lora_a, "lora_a", x.scalar_type(), table[1].size(0), packed_slices);
  check_a(x, a);
  const Batch batch(table, x.size(0), a.r_max());
  const auto mask = dropout_mask(rng, dropout_p);
  return with_compute_type(x, [&](auto* type) {
    using C = std::remove_pointer_t<decltype(type)>;
    return shrink_rows<C>(x, a, batch, mask, dropout_p).s;
  });
}

void expand_given(const Tensor& y, const Tensor& s, TensorList lora_b, TensorList table, bool add) {
  const Stacks b(lora_b, "lora_b", s.scalar_type(), table[1].size(0), 0);
  check_b(b, s.size(1), s.size(2));
  const Batch batch(table, s.size(0), s.size(2));
  with_compute_type(s, [&](auto* type) {
    using C = std::remove_pointer_t<decltype(type)>;
    expand_slices<C>(batch, Shrunk<C>(batch, s), b, y, add);
  });
}

Tensor segmented_expand(const Tensor& s, TensorList lora_b, TensorList table) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(s.dim() == 3, "s must be [M, n, r_max], got ", s.sizes());
  int64_t N = 0;
  for (const Tensor& t : lora_b) N += t.size(1);
  Tensor y = at::empty({s.size(0), N}, s.options());
  expand_given(y, s, lora_b, table, false);
  return y;
}

void segmented_expand_(const Tensor& y, const Tensor& s, TensorList lora_b, TensorList table) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(s.dim() == 3, "s must be [M, n, r_max], got ", s.sizes());
  expand_given(y, s, lora_b, table, true);
}

std::tuple<Tensor, Tensor> lora(const Tensor& x, TensorList lora_a, TensorList lora_b,
                                TensorList table, int64_t packed_slices, const OptionalTensor& rng,
                                double dropout_p, const OptionalTensor& out) {
  matrix(x, "x");
  const int64_t slots = table[1].size(0);
  const Stacks a(lora_a, "lora_a", x.scalar_type(), slots, packed_slices);
  const Stacks b(lora_b, "lora_b", x.scalar_type(), slots, 0);
  check_a(x, a);
  check_b(b, a.slices(), a.r_max());
  const Batch batch(table, x.size(0), a.r_max());
  const auto mask = dropout_mask(rng, dropout_p);
  const int64_t N = offsets(b).back();
  const Tensor y = out ? *out : at::empty({x.size(0), N}, x.options());
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(0) == x.size(0) && y.size(1) == N &&
                        y.scalar_type() == x.scalar_type(),
                    "y must be ", x.scalar_type(), " [", x.size(0), ", ", N, "], got ",
                    y.scalar_type(), " ", y.sizes());
  return with_compute_type(x, [&](auto* type) {
    using C = std::remove_pointer_t<decltype(type)>;
    const Shrunk<C> s = shrink_rows<C>(x, a, batch, mask, dropout_p);
    expand_slices<C>(batch, s, b, y, out.has_value());
    return std::make_tuple(y, s.s);
  });
}

std::tuple<Tensor, Tensor> segmented_lora(const Tensor& x, TensorList lora_a, TensorList lora_b,
                                          TensorList table, int64_t packed_slices,
                                          const OptionalTensor& rng, double dropout_p) {
  at::AutoDispatchBelowADInplaceOrView guard;
  return lora(x, lora_a, lora_b, table, packed_slices, rng, dropout_p, std::nullopt);
}

void segmented_lora_(const Tensor& y, const Tensor& x, TensorList lora_a, TensorList lora_b,
                     TensorList table, int64_t packed_slices) {
  at::AutoDispatchBelowADInplaceOrView guard;
  lora(x, lora_a, lora_b, table, packed_slices, std::nullopt, 0.0, y);
}

std::tuple<Tensor, Tensor> segmented_lora_dx(const Tensor& dy, TensorList lora_a, TensorList lora_b,
                                             TensorList table, int64_t packed_slices,
                                             const OptionalTensor& rng, double dropout_p) {
  at::AutoDispatchBelowADInplaceOrView guard;
  matrix(dy, "dy");
  const int64_t slots = table[1].size(0);
  const Stacks a(lora_a, "lora_a", dy.scalar_type(), slots, packed_slices);
  const Stacks b(lora_b, "lora_b", dy.scalar_type(), slots, 0);
  check_b(b, a.slices(), a.r_max());
  const std::vector<int64_t> first = offsets(b);
  TORCH_CHECK_VALUE(dy.size(1) == first.back(), "dy must be [M, ", first.back(), "], got ",
                    dy.sizes());
  const Batch batch(table, dy.size(0), a.r_max());
  const auto mask = dropout_mask(rng, dropout_p);
  const int64_t n = a.slices();
  Tensor dx = at::empty({dy.size(0), a.cols()}, dy.options());
  return with_compute_type(dy, [&](auto* type) {
    using C = std::remove_pointer_t<decltype(type)>;
    const std::vector<int64_t> logical = batch.logical();
    const Gathered<C> rows(matrix(dy, "dy"), batch, {first.begin(), first.end() - 1},
                           {first.begin() + 1, first.end()}, std::nullopt, logical, dy.options());
    const Shrunk<C> d(
        batch, rows, dy.size(0), n, a.r_max(), 1.0 - dropout_p,
        [&](const Segment& segment, int64_t j) { return b.b(segment, j).transposed(); },
        dy.options());
    std::vector<DropoutMask> masks;
    for (int64_t j = 0; mask && j < n; ++j) masks.push_back(of_slice(*mask, j));
    std::vector<Contribution<C>> contributions;
    std::vector<Expand<C>> jobs;
    contributions.reserve(batch.segments.size() * n);
    for (size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment& segment = batch.segments[i];
      for (int64_t j = 0; j < n; ++j) {
        contributions.push_back({d.rows(batch, i, j), a.a(segment, j), mask ? &masks[j] : nullptr});
      }
      jobs.push_back({&contributions[i * n], n, batch.order + segment.first,
                      logical.data() + segment.first, matrix(dx, "dx"), false});
    }
    expand(jobs.data(), jobs.size());
    zero_others(batch, dx);
    return std::make_tuple(dx, d.s);
  });
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> segmented_lora_dab(
    const Tensor& dy, const OptionalTensor& x, const OptionalTensor& s, const OptionalTensor& d,
    TensorList table, at::IntArrayRef widths, int64_t r_max, int64_t packed_slices,
    const OptionalTensor& rng, double dropout_p, std::optional<at::ScalarType> da_dtype,
    std::optional<at::ScalarType> db_dtype) {
  at::AutoDispatchBelowADInplaceOrView guard;
  matrix(dy, "dy");
  TORCH_CHECK_VALUE(!da_dtype || (x && d), "dA needs x and d");
  TORCH_CHECK_VALUE(!db_dtype || s, "dB needs s");
  const Batch batch(table, dy.size(0), r_max);
  const auto mask = dropout_mask(rng, dropout_p);
  const int64_t n = widths.size();
  std::vector<int64_t> first(1, 0);
  for (const int64_t width : widths) first.push_back(first.back() + width);
  TORCH_CHECK_VALUE(first.back() == dy.size(1), "widths ", widths, " do not fit dy ", dy.sizes());
  const auto stored = [&](at::ScalarType dtype) {
    return dy.options().dtype(kind_or_none(dtype) ? dtype : at::kFloat);
  };
  std::vector<Tensor> da, db;
  if (da_dtype) {
    const int64_t rows = packed_slices ? n * r_max : r_max;
    for (int64_t j = 0; j < (packed_slices ? 1 : n); ++j) {
      da.push_back(at::zeros({batch.slots, rows, x->size(1)}, stored(*da_dtype)));
    }
  }
  if (db_dtype) {
    for (const int64_t width : widths) {
      db.push_back(at::zeros({batch.slots, width, r_max}, stored(*db_dtype)));
    }
  }
  with_compute_type(dy, [&](auto* type) {
    using C = std::remove_pointer_t<decltype(type)>;
    const std::vector<int64_t> logical = batch.logical();
    std::optional<Gathered<C>> x_rows, dy_rows;
    std::optional<Shrunk<C>> s_rows, d_rows;
    if (da_dtype) {
      x_rows.emplace(matrix(*x, "x"), batch, repeated(0, n), repeated(x->size(1), n), mask, logical,
                     dy.options());
      d_rows.emplace(batch, *d);
    }
    if (db_dtype) {
      dy_rows.emplace(matrix(dy, "dy"), batch, std::vector<int64_t>{first.begin(), first.end() - 1},
                      std::vector<int64_t>{first.begin() + 1, first.end()}, std::nullopt, logical,
                      dy.options());
      s_rows.emplace(batch, *s);
    }
    const auto as_matrix = [](const Rows<C>& rows) {
      return Matrix{const_cast<C*>(rows.data), kind_of<C>, rows.M, rows.K, rows.ld, 1};
    };
    std::vector<Reduction<C>> reductions;
    for (size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment& segment = batch.segments[i];
      for (int64_t j = 0; j < n; ++j) {
        if (da_dtype) {
          const int64_t row = packed_slices ? j * segment.rank : 0;
          reductions.push_back(
              {as_matrix(d_rows->rows(batch, i, j)),
               as_matrix(x_rows->of(segment, j)),
               nullptr,
               part(da[packed_slices ? 0 : j], segment.slot, row, segment.rank, x->size(1)),
               {}});
        }
        if (db_dtype) {
          const Matrix out = part(db[j], segment.slot, 0, widths[j], segment.rank);
          reductions.push_back({as_matrix(s_rows->rows(batch, i, j)),
                                as_matrix(dy_rows->of(segment, j)),
                                nullptr,
                                out.transposed(),
                                {}});
        }
      }
    }
    reduce(reductions.data(), reductions.size());
  });
  for (Tensor& t : da) t = t.to(*da_dtype);
  for (Tensor& t : db) t = t.to(*db_dtype);
  return {da, db};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lora_kernels_cpu, m) {
  m.def("segment_schedule_(Tensor(a!)[] table, int block_rows) -> ()");
  m.def(
      "segmented_shrink(Tensor x, Tensor[] lora_a, Tensor[] table, int packed_slices=0, "
      "Tensor? rng=None, float dropout_p=0.0) -> Tensor");
  m.def("segmented_expand(Tensor s, Tensor[] lora_b, Tensor[] table) -> Tensor");
  m.def("segmented_expand_(Tensor(a!) y, Tensor s, Tensor[] lora_b, Tensor[] table) -> ()");
  m.def(
      "segmented_lora(Tensor x, Tensor[] lora_a, Tensor[] lora_b, Tensor[] table, "
      "int packed_slices=0, Tensor? rng=None, float dropout_p=0.0) -> (Tensor, Tensor)");
  m.def(
      "segmented_lora_(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor[] table, int packed_slices=0) -> ()");
  m.def(
      "segmented_lora_dx(Tensor dy, Tensor[] lora_a, Tensor[] lora_b, Tensor[] table, "
      "int packed_slices=0, Tensor? rng=None, float dropout_p=0.0) -> (Tensor, Tensor)");
  m.def(
      "segmented_lora_dab(Tensor dy, Tensor? x, Tensor? s, Tensor? d, Tensor[] table, "
      "int[] widths, int r_max, int packed_slices=0, Tensor? rng=None, float dropout_p=0.0, "
      "ScalarType? da_dtype=None, ScalarType? db_dtype=None) -> (Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("segment_schedule_", &segment_schedule_);
  m.impl("segmented_shrink", &segmented_shrink);
  m.impl("segmented_expand", &segmented_expand);
  m.impl("segmented_expand_", &segmented_expand_);
  m.impl("segmented_lora", &segmented_lora);
  m.impl("segmented_lora_", &segmented_lora_);
  m.impl("segmented_lora_dx", &segmented_lora_dx);
  m.impl("segmented_lora_dab", &segmented_lora_dab);
}

}  // namespace lora_kernels
