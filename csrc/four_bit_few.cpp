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
      const __m256i q = _mm256_loadu_si256((const __m256i*)(bytes + j * w.cols / 2 + b * 32));
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
      const __m512i q = _mm512_loadu_si512(bytes + j * w.cols / 2 + k / 2);
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
  float* scales = part_scratch.of<float>(4 * blocks);
  const auto read = [&](int64_t j, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      scales_of(w, (w.first + n + j + i) * K / w.block, blocks, scales + i * blocks);
    }
  };
  int64_t j = 0;
  for (; j + 4 <= cols; j += 4) {
    read(j, 4);
    ask_for(w, n + j + 4, 4, 0, K);
    few<kM, 4>(K, x, w, n + j, scales, blocks, c + j);
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

namespace {

// How rows of w are multiplied as they are decoded: kValues of a row to a vector, kRowsOfX and
// kRowsOfW rows in one step, whose sums fill the registers.
#if defined(__AVX512F__)
// Sums of four vectors, each its own.
inline __m128 sums_of(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const auto low = (__m512)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd);
  const __m512 all = _mm512_add_ps(low, (__m512)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int kM, int kN>
inline void add_sums(const __m512 (&acc)[kM][kN], float* c) {
  for (int i = 0; i < kM; ++i, c += kPanel) {
    if constexpr (kN == 4) {
      const __m128 sums = sums_of(acc[i][0], acc[i][1], acc[i][2], acc[i][3]);
      _mm_storeu_ps(c, _mm_add_ps(_mm_loadu_ps(c), sums));
    } else {
      for (int j = 0; j < kN; ++j) c[j] += _mm512_reduce_add_ps(acc[i][j]);
    }
  }
}

template <typename C>
struct Dots;

template <>
struct Dots<float> {
  using Value = float;
  static constexpr int kValues = 16, kRowsOfX = 6, kRowsOfW = 4;

  template <int kM, int kN>
  static void add(int64_t K, const float* x, int64_t ldx, const float* w, int64_t ldw, float* c) {
    __m512 acc[kM][kN] = {};
    for (int64_t k = 0; k < K; k += kValues) {
      __m512 columns[kN];
      for (int j = 0; j < kN; ++j) columns[j] = _mm512_loadu_ps(w + j * ldw + k);
      for (int i = 0; i < kM; ++i) {
        const __m512 row = _mm512_loadu_ps(x + i * ldx + k);
        for (int j = 0; j < kN; ++j) acc[i][j] = _mm512_fmadd_ps(row, columns[j], acc[i][j]);
      }
    }
    add_sums(acc, c);
  }
};

template <>
struct Dots<BFloat16> {
  using Value = BFloat16;
  static constexpr int kValues = 32, kRowsOfX = 6, kRowsOfW = 4;

  template <int kM, int kN>
  __attribute__((target("avx512bf16"))) static void add(int64_t K, const BFloat16* x, int64_t ldx,
                                                        const BFloat16* w, int64_t ldw, float* c) {
    __m512 acc[kM][kN] = {};
    for (int64_t k = 0; k < K; k += kValues) {
      __m512bh columns[kN];
      for (int j = 0; j < kN; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(w + j * ldw + k);
      for (int i = 0; i < kM; ++i) {
        const auto row = (__m512bh)_mm512_loadu_si512(x + i * ldx + k);
        for (int j = 0; j < kN; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], row, columns[j]);
      }
    }
    add_sums(acc, c);
  }
};
#else
template <int kStep, int... i>
inline Vec turned(Vec v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ kStep)...);
}

inline float sum(Vec v) {
  using Indices = std::make_integer_sequence<int, kLanes>;
  if constexpr (kLanes > 4) v += turned<4>(v, Indices{});
  v += turned<2>(v, Indices{});
  v += turned<1>(v, Indices{});
  return v[0];
}

// A bfloat16 is multiplied as a float.
template <typename C>
struct Dots {
  using Value = float;
  static constexpr int kValues = kLanes, kRowsOfX = 3, kRowsOfW = 4;

  template <int kM, int kN>
  static void add(int64_t K, const float* x, int64_t ldx, const float* w, int64_t ldw, float* c) {
    Vec acc[kM][kN] = {};
    for (int64_t k = 0; k < K; k += kLanes) {
      Vec rows[kM];
      for (int i = 0; i < kM; ++i) rows[i] = load<Vec>(x + i * ldx + k);
      for (int j = 0; j < kN; ++j) {
        const Vec column = load<Vec>(w + j * ldw + k);
        for (int i = 0; i < kM; ++i) acc[i][j] += rows[i] * column;
      }
    }
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kN; ++j) c[i * kPanel + j] += sum(acc[i][j]);
    }
  }
};
#endif

// In tiles of even heights: one of few rows alone would wait for its sums.
template <typename D, int kM, int kN>
void all_dots(int64_t M, int64_t K, const typename D::Value* x, int64_t ldx,
              const typename D::Value* w, int64_t ldw, float* c) {
  if constexpr (kM > 1) {
    if (ceil_div(M, ceil_div(M, D::kRowsOfX)) < kM) {
      return all_dots<D, kM - 1, kN>(M, K, x, ldx, w, ldw, c);
    }
  }
  for (; M >= kM; M -= kM, x += kM * ldx, c += kM * kPanel) {
    D::template add<kM, kN>(K, x, ldx, w, ldw, c);
  }
  if constexpr (kM > 1) {
    if (M > 0) all_dots<D, kM - 1, kN>(M, K, x, ldx, w, ldw, c);
  }
}

// Rows of x up to which that was faster than by panels, and columns at a stretch: a lane then sums
// no more products than kPart<C>.
#if defined(__AVX512F__)
// 2048 x 2048, one thread of Zen 5, in us, along rows and by panels: bfloat16 8 rows 332 and 499,
// 32 rows 831 and 891, 48 rows 1,095 and 1,145, 64 rows 1,469 and 1,429; float32 8 rows 492 and
// 904, 48 rows 2,144 and 2,241, 96 rows 3,990 and 3,911 (2026-11).
constexpr int64_t kAlongRows = 48;
constexpr int64_t kStretch = 1024;
#else
// 2048 x 2048, float32, one thread of Zen 1, in us, along rows and by panels: 16 rows 6,400 and
// 10,600; 128 rows 37,400 and 41,400; 512 rows the same; 2048 rows 15% more along rows (2026-11).
constexpr int64_t kAlongRows = 192;
constexpr int64_t kStretch = kPart<float> * kLanes;
#endif

}  // namespace

template <typename C>
bool multiplies_along_rows(int64_t M, const FourBit& w) {
#if defined(__AVX512F__)
  if (std::is_same_v<C, BFloat16> && bfloat16_product() == Bfloat16Product::kFloat) return false;
#endif
  return M <= kAlongRows && w.inner;
}

template <typename C>
void product_along_rows(int64_t M, int64_t cols, const C* x, int64_t ld, const FourBit& w,
                        int64_t n, float* c) {
  using D = Dots<C>;
  using V = typename D::Value;
  V* decoded = part_scratch.of<V>(D::kRowsOfW * kStretch);
  const auto pad = [](V* row, int64_t count, int64_t K) { std::fill(row + count, row + K, V(0)); };
  for (int64_t k = 0; k < w.cols; k += kStretch) {
    const int64_t end = std::min(w.cols, k + kStretch), count = end - k;
    const int64_t K = ceil_div(count, D::kValues) * D::kValues;
    const V* rows = nullptr;
    int64_t ldx = ld;
    if constexpr (std::is_same_v<C, V>) rows = x + k;
    if (!std::is_same_v<C, V> || K != count) {
      V* copied = rows_scratch.of<V>(M * kStretch);
      ldx = kStretch;
      for (int64_t i = 0; i < M; ++i) {
        std::copy(x + i * ld + k, x + i * ld + end, copied + i * ldx);
        pad(copied + i * ldx, count, K);
      }
      rows = copied;
    }
    for (int64_t j = 0; j < cols; j += D::kRowsOfW) {
      const int64_t some = std::min<int64_t>(D::kRowsOfW, cols - j);
      decode<C>(w, n + j, n + j + some, k, end, decoded, kStretch);
      if (j + some < cols) ask_for(w, n + j + some, D::kRowsOfW, k, end);
      for (int64_t i = 0; i < some; ++i) pad(decoded + i * kStretch, count, K);
      if (some == D::kRowsOfW) {
        all_dots<D, D::kRowsOfX, D::kRowsOfW>(M, K, rows, ldx, decoded, kStretch, c + j);
        continue;
      }
      for (int64_t i = 0; i < some; ++i) {
        all_dots<D, D::kRowsOfX, 1>(M, K, rows, ldx, decoded + i * kStretch, kStretch, c + j + i);
      }
    }
  }
}

#define LORA_KERNELS_INSTANTIATE(C)                                                              \
  template bool decodes_in_registers<C>(int64_t, const FourBit&);                                \
  template void arrange_rows(int64_t, int64_t, const C*, int64_t, C*);                           \
  template void product_of_few(int64_t, int64_t, const C*, const FourBit&, int64_t, float*);     \
  template bool multiplies_along_rows<C>(int64_t, const FourBit&);                               \
  template void product_along_rows(int64_t, int64_t, const C*, int64_t, const FourBit&, int64_t, \
                                   float*);
LORA_KERNELS_INSTANTIATE(float)
LORA_KERNELS_INSTANTIATE(BFloat16)
#undef LORA_KERNELS_INSTANTIATE

}  // namespace lora_kernels
