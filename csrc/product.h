// The one inner loop under every kernel: rows times a panel, into a float32 tile in cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "matrix.h"
#include "panel.h"

namespace lora_kernels {

// What multiplies pairs of bfloat16. The widest that the machine has is chosen at load.
enum class Bfloat16Product {
  kFloat,   // each half as a float: any machine
  kDot,     // AVX512-BF16's instruction
  kBrgemm,  // ATen's brgemm: AMX
};

Bfloat16Product bfloat16_product();
// False, and nothing is changed, where this machine or this build does not have it.
bool set_bfloat16_product(Bfloat16Product product);

// Fewer multiplications than this are done by one thread. A second one that sleeps (OpenMP's
// passive waiting) comes in 60 to 130 us, one that spins in 2: a layer of 256 x 256 with one row
// takes 21 us by one thread, by two 149 and 21 (Zen 5, float32, 2026-11).
constexpr int64_t kFewProducts = int64_t{1} << 18;

// The grain of at::parallel_for over `tasks` that are `products` multiplications in all.
inline int64_t grain_of(int64_t tasks, int64_t products) {
  return products < kFewProducts ? std::max<int64_t>(tasks, 1) : 1;
}

// Along the inner axis products are summed in parts of this length, each from zero, which are then
// added up in order: float32 operands summed at a stretch of 512 miss the error budget now and
// then, and products of bfloat16 are far below their own rounding. A sum does not depend on the
// other rows, nor on their number.
template <typename C>
constexpr int64_t kPart = std::is_same_v<C, float> ? 128 : 512;

// c = a b, or c += a b with `add`: a [M, K] with unit stride along K, b K rows of a panel of
// `depth` rows and `width` columns, c [M, kPanel]. K <= kPart<C>.
void product(int64_t M, int64_t width, int64_t K, int64_t depth, const float* a, int64_t lda,
             const float* b, float* c, bool add);
void product(int64_t M, int64_t width, int64_t K, int64_t depth, const BFloat16* a, int64_t lda,
             const BFloat16* b, float* c, bool add);

// c = a b for S and D, each half of a part from zero. Of the few values of S [5, 8], K = 192, the
// largest error misses the budget in 2 of 60 draws where 128 products are summed at a stretch, and
// takes 0.64 of it at most where 64 are (beside MKL's, with AVX-512 on Intel).
template <typename C>
void product_in_halves(int64_t M, int64_t width, int64_t K, const C* a, int64_t lda, const C* b,
                       float* c) {
  constexpr int64_t kHalf = std::is_same_v<C, float> ? kPart<C> / 2 : kPart<C>;
  for (int64_t k = 0; k == 0 || k < K; k += kHalf) {
    product(M, width, std::min(kHalf, K - k), K, a + k, lda,
            b + k * std::min<int64_t>(width, kStrip), c, k > 0);
  }
}

// Whether a product of M rows may read b [K, N] where it lies, from column n on: of its own type,
// with unit stride along an axis and nothing to be padded. With few rows packing costs more than it
// saves.
template <typename C>
bool reads_in_place(int64_t M, const ConstMatrix& b, int64_t n);

// c += a b for any K, by parts, with b's columns [n, n + width) where they lie: the same bits as
// from a panel.
template <typename C>
void product_in_place(int64_t M, int64_t width, const C* a, int64_t lda, const ConstMatrix& b,
                      int64_t n, float* c);

// c = or += a b for any K, by parts; `panel_at(k, k_end)` gives the panel's rows k to k_end.
template <typename C, typename PanelAt>
void product_by_parts(int64_t M, int64_t width, int64_t K, const C* a, int64_t lda,
                      PanelAt panel_at, float* c, bool add) {
  if (K == 0 && !add) std::fill(c, c + M * kPanel, 0.0f);
  for (int64_t k = 0; k < K; k += kPart<C>) {
    const int64_t end = std::min(K, k + kPart<C>);
    const int64_t depth = padded<C>(end - k);
    product(M, width, depth, depth, a + k, lda, panel_at(k, end), c, add || k > 0);
  }
}

// To be called by a thread that is done with products: gives AMX's tiles back.
void release_products();

}  // namespace lora_kernels
