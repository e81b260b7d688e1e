// Products of few rows with a four-bit weight, which is multiplied as it is decoded and never
// packed.
#include <algorithm>
#include <type_traits>

#include "four_bit.h"
#include "memory.h"
#include "panel.h"
#include "product.h"
#include "vec.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lora_kernels {

namespace {

constexpr int kFew = 4;

#if defined(__AVX512F__)
constexpr int kRowsOfW = 4;  // at once; those after them are asked for, a line for a line

// Values that one step of the products below takes from a row of w: 32 bytes for bfloat16, whose
// nibbles make 4 vectors of 16 halves, 64 bytes for float, 8 vectors of 16 words.
template <typename C>
constexpr int kSpan = std::is_same_v<C, BFloat16> ? 64 : 128;
// Nibble t of a word of bytes is value kOrder[t] of it: the first value is in the high half.
constexpr int kOrder[8] = {1, 0, 3, 2, 5, 4, 7, 6};

float sum(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}

// Sums of kM arranged rows times kN rows of w; a block's sixteen values are scaled and rounded
// first, so that a weight is what it is in a panel.
template <int kM, int kN>
__attribute__((target("avx512bf16"))) void few(int64_t K, const BFloat16* x, const FourBit& w,
                                               int64_t row, const float* scales, int64_t ld,
                                               float* c) {
  // One chain of sums for each nibble, where the registers allow it.
  constexpr int kChains = kM * kN >= 16 ? 1 : kM * kN >= 8 ? 2 : 4;
  __m256 acc[kM][kN][kChains];
  for (auto& rows : acc) {
    for (auto& sums : rows) std::fill(sums, sums + kChains, _mm256_setzero_ps());
  }
  const __m512 code = _mm512_loadu_ps(w.code);
  const int shift = shift_of(w) - 6;
  const uint8_t* bytes = w.data + (w.first + row) * w.cols / 2;
  for (int64_t b = 0; b < K / 64; ++b, x += kM * 64) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      const __m512 scale = _mm512_set1_ps(scales[j * ld + (b >> shift)]);
      const __m256i table = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(code, scale));
      const uint8_t* from = bytes + j * w.cols / 2 + b * 32;
      const __m256i q = _mm256_loadu_si256((const __m256i*)from);
      ask_for_line(from + kRowsOfW * w.cols / 2);
#pragma GCC unroll 4
      for (int t = 0; t < 4; ++t) {
        const auto values = (__m256bh)_mm256_permutexvar_epi16(_mm256_srli_epi16(q, 4 * t), table);
#pragma GCC unroll 4
        for (int i = 0; i < kM; ++i) {
          __m256& sums = acc[i][j][t % kChains];
          const auto rows = (__m256bh)_mm256_loadu_si256((const __m256i*)(x + i * 64 + t * 16));
          sums = _mm256_dpbf16_ps(sums, values, rows);
        }
      }
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) {
      __m256 total = acc[i][j][0];
      for (int t = 1; t < kChains; ++t) total = _mm256_add_ps(total, acc[i][j][t]);
      c[i * kPanel + j] += sum(total);
    }
  }
}

template <int kM, int kN>
void few(int64_t K, const float* x, const FourBit& w, int64_t row, const float* scales, int64_t ld,
         float* c) {
  __m512 acc[kM][kN];
  for (auto& rows : acc) std::fill(rows, rows + kN, _mm512_setzero_ps());
  const __m512 code = _mm512_loadu_ps(w.code);
  const int shift = shift_of(w);
  const uint8_t* bytes = w.data + (w.first + row) * w.cols / 2;
  for (int64_t k = 0; k < K; k += 128, x += kM * 128) {
#pragma GCC unroll 4
    for (int j = 0; j < kN; ++j) {
      // A block is at least half of the step.
      const __m512 lower = _mm512_set1_ps(scales[j * ld + (k >> shift)]);
      const __m512 scale =
          _mm512_mask_blend_ps(0xFF00, lower, _mm512_set1_ps(scales[j * ld + ((k + 64) >> shift)]));
      const uint8_t* from = bytes + j * w.cols / 2 + k / 2;
      const __m512i q = _mm512_loadu_si512(from);
      ask_for_line(from + kRowsOfW * w.cols / 2);
      __m512 sums[kM][2] = {};
#pragma GCC unroll 8
      for (int t = 0; t < 8; ++t) {
        const __m512 values = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4 * t), code);
#pragma GCC unroll 4
        for (int i = 0; i < kM; ++i) {
          __m512& own = sums[i][t % 2];
          own = _mm512_fmadd_ps(values, _mm512_loadu_ps(x + i * 128 + t * 16), own);
        }
      }
      for (int i = 0; i < kM; ++i) {
        acc[i][j] = _mm512_fmadd_ps(_mm512_add_ps(sums[i][0], sums[i][1]), scale, acc[i][j]);
      }
    }
  }
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kN; ++j) c[i * kPanel + j] += _mm512_reduce_add_ps(acc[i][j]);
  }
}

template <int kM, typename C>
void few_rows(int64_t M, int64_t cols, const C* x, const FourBit& w, int64_t n, float* c) {
  if constexpr (kM > 1) {
    if (M < kM) return few_rows<kM - 1>(M, cols, x, w, n, c);
  }
  const int64_t K = w.cols, blocks = ceil_div(K, w.block);
  float* scales = part_scratch.of<float>(kRowsOfW * blocks);
  const auto read = [&](int64_t j, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      scales_of(w, (w.first + n + j + i) * K / w.block, blocks, scales + i * blocks);
    }
  };
  int64_t j = 0;
  for (; j + kRowsOfW <= cols; j += kRowsOfW) {
    read(j, kRowsOfW);
    few<kM, kRowsOfW>(K, x, w, n + j, scales, blocks, c + j);
  }
  for (; j < cols; ++j) {
    read(j, 1);
    few<kM, 1>(K, x, w, n + j, scales, blocks, c + j);
  }
}
#endif

}  // namespace

template <typename C>
bool decodes_in_registers(int64_t M, const FourBit& w) {
#if defined(__AVX512F__)
  if (std::is_same_v<C, BFloat16> && bfloat16_product() == Bfloat16Product::kFloat) return false;
  // A row lies in one block, or begins with a block.
  return M <= kFew && w.inner && w.block >= 64 && w.cols % kSpan<C> == 0 &&
         (w.cols % w.block == 0 || w.block % w.cols == 0);
#else
  (void)M, (void)w;
  return false;
#endif
}

template <typename C>
void arrange_rows(int64_t M, int64_t K, const C* x, int64_t ld, C* out) {
#if defined(__AVX512F__)
  constexpr int kVectors = kSpan<C> / 16;
  for (int64_t k = 0; k < K; k += kSpan<C>) {
    for (int64_t i = 0; i < M; ++i) {
      for (int t = 0; t < kVectors; ++t) {
        for (int j = 0; j < 16; ++j) *out++ = x[i * ld + k + j * kVectors + kOrder[t]];
      }
    }
  }
#else
  (void)M, (void)K, (void)x, (void)ld, (void)out;
#endif
}

template <typename C>
void product_of_few(int64_t M, int64_t cols, const C* arranged, const FourBit& w, int64_t n,
                    float* c) {
#if defined(__AVX512F__)
  few_rows<kFew>(M, cols, arranged, w, n, c);
#else
  (void)M, (void)cols, (void)arranged, (void)w, (void)n, (void)c;
#endif
}

#define LORA_KERNELS_INSTANTIATE(C)                                    \
  template bool decodes_in_registers<C>(int64_t, const FourBit&);      \
  template void arrange_rows(int64_t, int64_t, const C*, int64_t, C*); \
  template void product_of_few(int64_t, int64_t, const C*, const FourBit&, int64_t, float*);
LORA_KERNELS_INSTANTIATE(float)
LORA_KERNELS_INSTANTIATE(BFloat16)
#undef LORA_KERNELS_INSTANTIATE

}  // namespace lora_kernels
