#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "linear.h"
#include "panel.h"
#include "product.h"

namespace lora_kernels {

template <typename C>
void copy_all_rows(const ConstMatrix& x, C* out, int64_t ld) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, x.cols));
  at::parallel_for(0, x.rows, grain, [&](int64_t begin, int64_t end) {
    copy_rows(x, begin, end, 0, x.cols, out + begin * ld, ld);
  });
}

template <typename C>
void pack(const ConstMatrix& b, C* packed) {
  const int64_t K = b.rows, parts = ceil_div(K, kPart<C>);
  at::parallel_for(0, panels(b.cols) * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t / parts * kPanel, k = t % parts * kPart<C>;
      C* panel = packed + n * padded<C>(K) + k * panel_width(b.cols - n);
      pack_panel(b, k, std::min(K, k + kPart<C>), n, panel);
    }
  });
}

namespace {

// f(n) for every n of [N, r, E], of which one is some KiB, by all threads.
template <typename F>
void for_each_row(int64_t N, int64_t size, F f) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, size));
  at::parallel_for(0, N, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) f(n);
  });
}

}  // namespace

template <typename T>
void experts_last(const T* in, int64_t E, int64_t N, int64_t r, T* out) {
  for_each_row(N, r * E, [&](int64_t n) {
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t k = 0; k < r; ++k) out[(n * r + k) * E + e] = in[(e * N + n) * r + k];
    }
  });
}

template <typename T>
void experts_first(const T* in, int64_t E, int64_t N, int64_t r, T* out) {
  for_each_row(N, r * E, [&](int64_t n) {
    for (int64_t e = 0; e < E; ++e) {
      for (int64_t k = 0; k < r; ++k) out[(e * N + n) * r + k] = in[(n * r + k) * E + e];
    }
  });
}

template <typename C>
bool is_packed(const ConstMatrix& b, const C* packed) {
  constexpr int64_t kSamples = 64;
  // Steps that are coprime to powers of two and far from small multiples of usual sizes.
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t k = i * 7919 % b.rows, n = i * 104729 % b.cols;
    const int64_t n0 = n / kPanel * kPanel, width = panel_width(b.cols - n0);
    const int64_t k0 = k / kPart<C> * kPart<C>, depth = padded<C>(std::min(kPart<C>, b.rows - k0));
    const C* panel = packed + n0 * padded<C>(b.rows) + k0 * width;
    const C held = panel[place<C>(k - k0, n - n0, depth, width)];
    C value;
    with_type(b.kind, [&]<typename T>() {
      value =
          C(static_cast<float>(static_cast<const T*>(b.data)[k * b.stride_row + n * b.stride_col]));
    });
    if (std::memcmp(&held, &value, sizeof(C)) != 0) return false;
  }
  return true;
}

template void copy_all_rows(const ConstMatrix&, float*, int64_t);
template void copy_all_rows(const ConstMatrix&, BFloat16*, int64_t);
template void pack(const ConstMatrix&, float*);
template void pack(const ConstMatrix&, BFloat16*);
template void experts_last(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*);
template void experts_last(const float*, int64_t, int64_t, int64_t, float*);
template void experts_first(const uint16_t*, int64_t, int64_t, int64_t, uint16_t*);
template void experts_first(const float*, int64_t, int64_t, int64_t, float*);
template bool is_packed(const ConstMatrix&, const float*);
template bool is_packed(const ConstMatrix&, const BFloat16*);

}  // namespace lora_kernels
