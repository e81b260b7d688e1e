// The boundary of the segmented operators.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
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

// Where the columns of each slice begin, and where the last ends.
std::vector<int64_t> offsets(at::IntArrayRef widths) {
  std::vector<int64_t> first(1, 0);
  for (const int64_t width : widths) first.push_back(first.back() + width);
  return first;
}

std::vector<int64_t> begins(const std::vector<int64_t>& offsets) {
  return {offsets.begin(), offsets.end() - 1};
}

std::vector<int64_t> ends(const std::vector<int64_t>& offsets) {
  return {offsets.begin() + 1, offsets.end()};
}

std::vector<int64_t> repeated(int64_t value, int64_t count) {
  return std::vector<int64_t>(count, value);
}

void check_rows(const Tensor& y, const char* name, const Tensor& like, int64_t N,
                at::ScalarType dtype) {
  TORCH_CHECK_VALUE(y.dim() == 2 && y.size(0) == like.size(0) && y.size(1) == N, name, " must be [",
                    like.size(0), ", ", N, "], got ", y.sizes());
  TORCH_CHECK_TYPE(y.scalar_type() == dtype, name, " must be ", dtype, ", got ", y.scalar_type());
  matrix(y, name);
}

// S or D.
void check_tail(const Tensor& s, const char* name, int64_t M, int64_t n, int64_t r_max) {
  TORCH_CHECK_VALUE(s.dim() == 3 && s.size(0) == M && s.size(1) == n && s.size(2) == r_max, name,
                    " must be [", M, ", ", n, ", ", r_max, "], got ", s.sizes());
  TORCH_CHECK_TYPE(kind_or_none(s.scalar_type()), name,
                   " must be float32, bfloat16 or float16, got ", s.scalar_type());
}

void check_a(const Stacks& a, int64_t K) {
  for (const Tensor& t : a.tensors) {
    TORCH_CHECK_VALUE(t.size(2) == K && t.size(1) == a.tensors[0].size(1) &&
                          t.size(1) % a.slices() * a.packed_slices == 0,
                      "lora_a ", t.sizes(), " does not fit K = ", K, " and ", a.slices(),
                      " slices");
  }
}

void check_b(const Stacks& b, int64_t slices, int64_t r_max) {
  TORCH_CHECK_VALUE(b.slices() == slices, "lora_a has ", slices, " slices and lora_b ", b.slices());
  for (const Tensor& t : b.tensors) {
    TORCH_CHECK_VALUE(t.size(2) == r_max, "lora_b must be [S, N, ", r_max, "], got ", t.sizes());
  }
}

// A weight [K, N] under the adapters, with what belongs to it.
struct Base {
  Weight weight;
  OptionalTensor bias, packed;

  Base(const Tensor& rows, const Tensor& given, int64_t K, int64_t N, bool transposed,
       const OptionalTensor& bias, const OptionalTensor& packed, const Quant& quant, int64_t block)
      : weight(base_weight(given, K, N, transposed, rows.scalar_type(), quant, block)),
        bias(vector(bias, "bias", N)),
        packed(packed) {
    with_compute_type(rows, [&]<typename C>() { panels_of<C>(packed, K, N); });
  }
};

// y = x w + bias + the tails, with `add` y += the tails, of rows in the order of the batch.
template <typename C>
void multiply(const Batch& batch, const Rows<C>& x, const Base* base, const Tails<C>& tails,
              const std::vector<int64_t>& logical, const Tensor& y, bool add) {
  TailProduct<C> p = {};
  p.x = {nullptr, batch.live, 0, 0};
  if (base) {
    p.x = x;
    p.w = base->weight.matrix;
    p.four_bit = base->weight.bytes();
    p.packed = panels_of<C>(base->packed, p.w.rows, p.w.cols);
    p.bias = pointer(base->bias);
  }
  p.segments = tails.segments.data();
  p.count = static_cast<int64_t>(tails.segments.size());
  p.rows = batch.order;
  p.logical = logical.empty() ? nullptr : logical.data();
  p.y = result(y);
  p.add = add;
  tail_product(p);
  if (base || add) return;
  for (int64_t i = batch.live; i < y.size(0); ++i) y.select(0, batch.order[i]).zero_();
}

// The tails of a forward: S times B in the columns of each slice.
template <typename C>
Tails<C> tails_of(const Batch& batch, const Shrunk<C>& s, const Stacks& b) {
  const std::vector<int64_t> columns = begins(offsets(b.widths()));
  return Tails<C>(batch, s,
                  [&](const Segment& segment, int64_t j) {
                    const ConstMatrix right = b.b(segment, j).transposed();
                    return Right<C>{right,
                                    b.panels.of<C>(segment, j, right.rows, right.cols, columns[j])};
                  },
                  columns, {});
}

// x for every slice, in the order of the batch, and S.
template <typename C>
struct ShrunkRows {
  std::vector<int64_t> logical;
  Gathered<C> x;
  Shrunk<C> s;

  ShrunkRows(const Tensor& rows, const Stacks& a, const Batch& batch,
             const std::optional<DropoutMask>& mask, double dropout_p, bool base)
      : logical(batch.logical(mask.has_value())),
        x(matrix(rows, "x"), batch, repeated(0, a.slices()), repeated(rows.size(1), a.slices()),
          mask, logical, rows.options(), base),
        s(
            batch, x, rows.size(0), a.slices(), a.r_max(), 1.0 - dropout_p,
            [&](const Segment& segment, int64_t j) {
              const ConstMatrix left = a.a(segment, j);
              return Right<C>{left, a.panels.of<C>(segment, j, left.cols, left.rows, 0)};
            },
            rows.options()) {}
};

// y = or += x w + bias + S B^T; S is returned.
Tensor forward(const Tensor& x, const Base* base, const Stacks& a, const Stacks& b,
               const Batch& batch, const std::optional<DropoutMask>& mask, double dropout_p,
               const Tensor& y, bool add) {
  return with_compute_type(x, [&]<typename C>() {
    const ShrunkRows<C> rows(x, a, batch, mask, dropout_p, base != nullptr);
    multiply(batch, rows.x.whole, base, tails_of(batch, rows.s, b), {}, y, add);
    return rows.s.s;
  });
}

// dX = dY w + the sum over the slices of mask * (D A), and D.
std::tuple<Tensor, Tensor> backward(const Tensor& dy, const Base* base, const Stacks& a,
                                    const Stacks& b, const Batch& batch,
                                    const std::optional<DropoutMask>& mask, double dropout_p) {
  const int64_t n = a.slices();
  const std::vector<int64_t> columns = offsets(b.widths());
  Tensor dx = at::empty({dy.size(0), a.cols()}, dy.options());
  return with_compute_type(dy, [&]<typename C>() {
    const std::vector<int64_t> logical = batch.logical(mask.has_value());
    const Gathered<C> rows(matrix(dy, "dy"), batch, begins(columns), ends(columns), std::nullopt,
                           logical, dy.options(), base != nullptr);
    const Shrunk<C> d(
        batch, rows, dy.size(0), n, a.r_max(), 1.0 - dropout_p,
        [&](const Segment& segment, int64_t j) { return Right<C>{b.b(segment, j).transposed()}; },
        dy.options());
    std::vector<DropoutMask> masks;
    for (int64_t j = 0; mask && j < n; ++j) masks.push_back(of_slice(*mask, j));
    const Tails<C> tails(
        batch, d, [&](const Segment& segment, int64_t j) { return Right<C>{a.a(segment, j)}; },
        repeated(0, n), masks);
    multiply(batch, rows.whole, base, tails, logical, dx, false);
    return std::make_tuple(dx, d.s);
  });
}

Tensor segmented_shrink(const Tensor& x, TensorList lora_a, TensorList table, int64_t packed_slices,
                        const OptionalTensor& rng, double dropout_p) {
  at::AutoDispatchBelowADInplaceOrView guard;
  matrix(x, "x");
  const Stacks a(lora_a, "lora_a", x.scalar_type(), slots_of(table), packed_slices);
  check_a(a, x.size(1));
  const Batch batch(table, x.size(0), a.r_max());
  const auto mask = dropout_mask(rng, dropout_p);
  return with_compute_type(
      x, [&]<typename C>() { return ShrunkRows<C>(x, a, batch, mask, dropout_p, false).s.s; });
}

void segmented_expand_(const Tensor& y, const Tensor& s, TensorList lora_b, TensorList table) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK_VALUE(s.dim() == 3, "s must be [M, n, r_max], got ", s.sizes());
  check_tail(s, "s", s.size(0), s.size(1), s.size(2));
  const Stacks b(lora_b, "lora_b", s.scalar_type(), slots_of(table), 0);
  check_b(b, s.size(1), s.size(2));
  // S of float16 rows is float32.
  const bool of_rows = s.scalar_type() == compute_type(y.scalar_type());
  check_rows(y, "y", s, offsets(b.widths()).back(), of_rows ? y.scalar_type() : s.scalar_type());
  const Batch batch(table, s.size(0), s.size(2));
  with_compute_type(s, [&]<typename C>() {
    const Shrunk<C> given(batch, s);
    multiply<C>(batch, {}, nullptr, tails_of(batch, given, b), {}, y, true);
  });
}

// The stacks of a call and the batch that uses them, checked against rows x [M, K].
struct Call {
  Stacks a, b;
  Batch batch;
  std::optional<DropoutMask> mask;
  int64_t K, N;

  Call(const Tensor& rows, TensorList lora_a, TensorList lora_b, TensorList table,
       int64_t packed_slices, const OptionalTensor& rng, double dropout_p)
      : a(lora_a, "lora_a", rows.scalar_type(), slots_of(table), packed_slices),
        b(lora_b, "lora_b", rows.scalar_type(), slots_of(table), 0),
        batch(table, rows.size(0), a.r_max()),
        mask(dropout_mask(rng, dropout_p)),
        K(a.cols()),
        N(offsets(b.widths()).back()) {
    check_a(a, K);
    check_b(b, a.slices(), a.r_max());
  }

  // The ranks [S] that the stacks' panels were packed for, then those of A and those of B.
  void take(TensorList panels) {
    const size_t n = a.slices();
    TORCH_CHECK_VALUE(panels.size() == 1 + 2 * n && panels[0].scalar_type() == at::kInt,
                      "panels must hold int32 ranks and a tensor for each A and each B");
    for (const Tensor& t : panels) {
      TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous() && t.dim() == (&t == &panels[0] ? 1 : 2) &&
                            t.size(0) == batch.slots,
                        "panels must be contiguous, one for each of ", batch.slots, " slots");
    }
    const auto* ranks = panels[0].const_data_ptr<int32_t>();
    a.panels = {panels.slice(1, n).vec(), ranks};
    b.panels = {panels.slice(1 + n, n).vec(), ranks};
  }
};

Call call_of_x(const Tensor& x, TensorList lora_a, TensorList lora_b, TensorList table,
               int64_t packed_slices, const OptionalTensor& rng, double dropout_p) {
  matrix(x, "x");
  Call call(x, lora_a, lora_b, table, packed_slices, rng, dropout_p);
  TORCH_CHECK_VALUE(x.size(1) == call.K, "x must be [M, ", call.K, "], got ", x.sizes());
  return call;
}

Call call_of_dy(const Tensor& dy, TensorList lora_a, TensorList lora_b, TensorList table,
                int64_t packed_slices, const OptionalTensor& rng, double dropout_p) {
  matrix(dy, "dy");
  Call call(dy, lora_a, lora_b, table, packed_slices, rng, dropout_p);
  TORCH_CHECK_VALUE(dy.size(1) == call.N, "dy must be [M, ", call.N, "], got ", dy.sizes());
  return call;
}

std::tuple<Tensor, Tensor> segmented_lora(const Tensor& x, TensorList lora_a, TensorList lora_b,
                                          TensorList table, int64_t packed_slices,
                                          const OptionalTensor& rng, double dropout_p) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Call call = call_of_x(x, lora_a, lora_b, table, packed_slices, rng, dropout_p);
  Tensor y = at::empty({x.size(0), call.N}, x.options());
  Tensor s = forward(x, nullptr, call.a, call.b, call.batch, call.mask, dropout_p, y, false);
  return {y, s};
}

void segmented_lora_(const Tensor& y, const Tensor& x, TensorList lora_a, TensorList lora_b,
                     TensorList table, int64_t packed_slices) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Call call = call_of_x(x, lora_a, lora_b, table, packed_slices, std::nullopt, 0.0);
  check_rows(y, "y", x, call.N, x.scalar_type());
  forward(x, nullptr, call.a, call.b, call.batch, std::nullopt, 0.0, y, true);
}

std::tuple<Tensor, Tensor> segmented_lora_dx(const Tensor& dy, TensorList lora_a, TensorList lora_b,
                                             TensorList table, int64_t packed_slices,
                                             const OptionalTensor& rng, double dropout_p) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Call call = call_of_dy(dy, lora_a, lora_b, table, packed_slices, rng, dropout_p);
  return backward(dy, nullptr, call.a, call.b, call.batch, call.mask, dropout_p);
}

std::tuple<Tensor, Tensor> segmented_linear_fwd(
    const Tensor& x, const Tensor& weight, TensorList lora_a, TensorList lora_b, TensorList table,
    int64_t packed_slices, const OptionalTensor& bias, const OptionalTensor& rng, double dropout_p,
    bool fan_in_fan_out, const OptionalTensor& packed, const Quant& quant, int64_t quant_block) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Call call = call_of_x(x, lora_a, lora_b, table, packed_slices, rng, dropout_p);
  const Base base(x, weight, call.K, call.N, !fan_in_fan_out, bias, packed, quant, quant_block);
  Tensor y = at::empty({x.size(0), call.N}, x.options());
  Tensor s = forward(x, &base, call.a, call.b, call.batch, call.mask, dropout_p, y, false);
  return {y, s};
}

// y of segmented_linear_fwd from adapters that were packed before: see Call::take.
Tensor segmented_linear_of_panels(const Tensor& x, const Tensor& weight, TensorList lora_a,
                                  TensorList lora_b, TensorList table, const OptionalTensor& bias,
                                  const OptionalTensor& packed, TensorList panels) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Call call = call_of_x(x, lora_a, lora_b, table, 0, std::nullopt, 0.0);
  call.take(panels);
  const Base base(x, weight, call.K, call.N, true, bias, packed, std::nullopt, 0);
  Tensor y = at::empty({x.size(0), call.N}, x.options());
  forward(x, &base, call.a, call.b, call.batch, std::nullopt, 0.0, y, false);
  return y;
}

std::tuple<Tensor, Tensor> segmented_linear_dx(const Tensor& dy, const Tensor& weight,
                                               TensorList lora_a, TensorList lora_b,
                                               TensorList table, int64_t packed_slices,
                                               const OptionalTensor& rng, double dropout_p,
                                               bool fan_in_fan_out, const OptionalTensor& packed,
                                               const Quant& quant, int64_t quant_block) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const Call call = call_of_dy(dy, lora_a, lora_b, table, packed_slices, rng, dropout_p);
  const Base base(dy, weight, call.N, call.K, fan_in_fan_out, std::nullopt, packed, quant,
                  quant_block);
  return backward(dy, &base, call.a, call.b, call.batch, call.mask, dropout_p);
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
  const std::vector<int64_t> first = offsets(widths);
  TORCH_CHECK_VALUE(first.back() == dy.size(1), "widths ", widths, " do not fit dy ", dy.sizes());
  if (da_dtype) {
    check_rows(*x, "x", dy, x->size(-1), x->scalar_type());
    check_tail(*d, "d", dy.size(0), n, r_max);
  }
  if (db_dtype) check_tail(*s, "s", dy.size(0), n, r_max);
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
  with_compute_type(dy, [&]<typename C>() {
    const std::vector<int64_t> logical = batch.logical(mask.has_value());
    std::optional<Gathered<C>> x_rows, dy_rows;
    std::optional<Shrunk<C>> s_rows, d_rows;
    if (da_dtype) {
      x_rows.emplace(matrix(*x, "x"), batch, repeated(0, n), repeated(x->size(1), n), mask, logical,
                     dy.options(), false);
      d_rows.emplace(batch, *d);
    }
    if (db_dtype) {
      dy_rows.emplace(matrix(dy, "dy"), batch, begins(first), ends(first), std::nullopt, logical,
                      dy.options(), false);
      s_rows.emplace(batch, *s);
    }
    const auto as_matrix = [](const Rows<C>& rows) {
      return ConstMatrix{rows.data, kind_of<C>, rows.M, rows.K, rows.ld, 1};
    };
    std::vector<Reduction<C>> reductions;
    for (size_t i = 0; i < batch.segments.size(); ++i) {
      const Segment& segment = batch.segments[i];
      for (int64_t j = 0; j < n; ++j) {
        if (da_dtype) {
          reductions.push_back({as_matrix(d_rows->rows(batch, i, j)),
                                as_matrix(x_rows->of(segment, j)),
                                nullptr,
                                part_of_a<void>(da, packed_slices, segment, j),
                                {}});
        }
        if (db_dtype) {
          const Matrix out = part<void>(db[j], segment.slot, 0, widths[j], segment.rank);
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
      "segmented_linear_fwd(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor[] table, int packed_slices=0, Tensor? bias=None, Tensor? rng=None, "
      "float dropout_p=0.0, bool fan_in_fan_out=False, Tensor? packed=None, Tensor[]? quant=None, "
      "int quant_block=0) -> (Tensor, Tensor)");
  m.def(
      "segmented_linear_of_panels(Tensor x, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor[] table, Tensor? bias, Tensor? packed, Tensor[] panels) -> Tensor");
  m.def(
      "segmented_linear_dx(Tensor dy, Tensor weight, Tensor[] lora_a, Tensor[] lora_b, "
      "Tensor[] table, int packed_slices=0, Tensor? rng=None, float dropout_p=0.0, "
      "bool fan_in_fan_out=False, Tensor? packed=None, Tensor[]? quant=None, "
      "int quant_block=0) -> (Tensor, Tensor)");
  m.def(
      "segmented_lora_dab(Tensor dy, Tensor? x, Tensor? s, Tensor? d, Tensor[] table, "
      "int[] widths, int r_max, int packed_slices=0, Tensor? rng=None, float dropout_p=0.0, "
      "ScalarType? da_dtype=None, ScalarType? db_dtype=None) -> (Tensor[], Tensor[])");
}

TORCH_LIBRARY_IMPL(lora_kernels_cpu, CPU, m) {
  m.impl("segment_schedule_", &segment_schedule_);
  m.impl("segmented_shrink", &segmented_shrink);
  m.impl("segmented_expand_", &segmented_expand_);
  m.impl("segmented_lora", &segmented_lora);
  m.impl("segmented_lora_", &segmented_lora_);
  m.impl("segmented_lora_dx", &segmented_lora_dx);
  m.impl("segmented_linear_fwd", &segmented_linear_fwd);
  m.impl("segmented_linear_of_panels", &segmented_linear_of_panels);
  m.impl("segmented_linear_dx", &segmented_linear_dx);
  m.impl("segmented_lora_dab", &segmented_lora_dab);
}

}  // namespace lora_kernels
