// The boundary of the segmented operators.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "batch.h"

namespace lora_kernels {

namespace {

// Fills the last four of SegmentTable.tensors() from the first two.
void segment_schedule_(TensorList table, int64_t block_rows) {
  const int64_t slots = slots_of(table), M = table[0].size(0), blocks = table[6].size(0);
  for (const int i : {0, 1, 4, 5, 6, 7}) {
    TORCH_CHECK_VALUE(table[i].is_cpu() && table[i].is_contiguous() && table[i].dim() == 1 &&
                          table[i].scalar_type() == at::kInt,
                      "the table must hold contiguous int32 vectors on the CPU");
  }
  TORCH_CHECK_VALUE(table[4].size(0) == M && table[5].size(0) == slots + 1 &&
                        table[7].size(0) == blocks &&
                        blocks >= ceil_div(M, block_rows) + std::min(M, slots),
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
  const std::vector<int64_t> logical = batch.logical(mask.has_value());
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
  const Stacks a(lora_a, "lora_a", x.scalar_type(), slots_of(table), packed_slices);
  check_a(x, a);
  const Batch batch(table, x.size(0), a.r_max());
  const auto mask = dropout_mask(rng, dropout_p);
  return with_compute_type(x, [&](auto* type) {
    using C = std::remove_pointer_t<decltype(type)>;
    return shrink_rows<C>(x, a, batch, mask, dropout_p).s;
  });
}

void expand_given(const Tensor& y, const Tensor& s, TensorList lora_b, TensorList table, bool add) {
  const Stacks b(lora_b, "lora_b", s.scalar_type(), slots_of(table), 0);
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
  const int64_t slots = slots_of(table);
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
  const int64_t slots = slots_of(table);
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
    const std::vector<int64_t> logical = batch.logical(mask.has_value());
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
  std::vector<Tensor> da, db;
  if (da_dtype) {
    const int64_t rows = packed_slices ? n * r_max : r_max;
    for (int64_t j = 0; j < (packed_slices ? 1 : n); ++j) {
      da.push_back(at::zeros({batch.slots, rows, x->size(1)}, stored_as(dy, *da_dtype)));
    }
  }
  if (db_dtype) {
    for (const int64_t width : widths) {
      db.push_back(at::zeros({batch.slots, width, r_max}, stored_as(dy, *db_dtype)));
    }
  }
  with_compute_type(dy, [&](auto* type) {
    using C = std::remove_pointer_t<decltype(type)>;
    const std::vector<int64_t> logical = batch.logical(mask.has_value());
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
          reductions.push_back({as_matrix(d_rows->rows(batch, i, j)),
                                as_matrix(x_rows->of(segment, j)),
                                nullptr,
                                part_of_a(da, packed_slices, segment, j),
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
