// Products of some dozens of rows with a four-bit weight, whose rows are multiplied as they are
// decoded and never packed.
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

// How rows of w are multiplied as they are decoded: kValues of a row to a vector, kRowsOfX and
// kRowsOfW rows in one step, whose sums fill the registers. `ahead` has something else done at
// every step.
struct Nothing {
  void at(int64_t) const {}
};

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

  template <int kM, int kN, typename Ahead>
  static void add(int64_t K, const float* x, int64_t ldx, const float* w, int64_t ldw, float* c,
                  const Ahead& ahead) {
    __m512 acc[kM][kN] = {};
    for (int64_t k = 0; k < K; k += kValues) {
      __m512 columns[kN];
      for (int j = 0; j < kN; ++j) columns[j] = _mm512_loadu_ps(w + j * ldw + k);
      for (int i = 0; i < kM; ++i) {
        const __m512 row = _mm512_loadu_ps(x + i * ldx + k);
        for (int j = 0; j < kN; ++j) acc[i][j] = _mm512_fmadd_ps(row, columns[j], acc[i][j]);
      }
      ahead.at(k);
    }
    add_sums(acc, c);
  }
};

template <>
struct Dots<BFloat16> {
  using Value = BFloat16;
  static constexpr int kValues = 32, kRowsOfX = 6, kRowsOfW = 4;

  template <int kM, int kN, typename Ahead>
  __attribute__((target("avx512bf16"))) static void add(int64_t K, const BFloat16* x, int64_t ldx,
                                                        const BFloat16* w, int64_t ldw, float* c,
                                                        const Ahead& ahead) {
    __m512 acc[kM][kN] = {};
    for (int64_t k = 0; k < K; k += kValues) {
      __m512bh columns[kN];
      for (int j = 0; j < kN; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(w + j * ldw + k);
      for (int i = 0; i < kM; ++i) {
        const auto row = (__m512bh)_mm512_loadu_si512(x + i * ldx + k);
        for (int j = 0; j < kN; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], row, columns[j]);
      }
      ahead.at(k);
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

  template <int kM, int kN, typename Ahead>
  static void add(int64_t K, const float* x, int64_t ldx, const float* w, int64_t ldw, float* c,
                  const Ahead& ahead) {
    Vec acc[kM][kN] = {};
    for (int64_t k = 0; k < K; k += kLanes) {
      Vec rows[kM];
      for (int i = 0; i < kM; ++i) rows[i] = load<Vec>(x + i * ldx + k);
      for (int j = 0; j < kN; ++j) {
        const Vec column = load<Vec>(w + j * ldw + k);
        for (int i = 0; i < kM; ++i) acc[i][j] += rows[i] * column;
      }
      ahead.at(k);
    }
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kN; ++j) c[i * kPanel + j] += sum(acc[i][j]);
    }
  }
};
#endif

// In tiles of even heights: one of few rows alone would wait for its sums. `ahead` is for the
// first.
template <typename D, int kM, int kN, typename Ahead = Nothing>
void all_dots(int64_t M, int64_t K, const typename D::Value* x, int64_t ldx,
              const typename D::Value* w, int64_t ldw, float* c, const Ahead& ahead = {}) {
  if constexpr (kM > 1) {
    if (ceil_div(M, ceil_div(M, D::kRowsOfX)) < kM) {
      return all_dots<D, kM - 1, kN>(M, K, x, ldx, w, ldw, c, ahead);
    }
  }
  D::template add<kM, kN>(K, x, ldx, w, ldw, c, ahead);
  for (M -= kM, x += kM * ldx, c += kM * kPanel; M >= kM;
       M -= kM, x += kM * ldx, c += kM * kPanel) {
    D::template add<kM, kN>(K, x, ldx, w, ldw, c, Nothing{});
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
// Where panels are looked up (look_up_unit) and products take nibbles. One or the other, two
// threads of Zen 4, cold weights, in us: 2048 x 2048 8 rows 430 and 410, 16 rows 600 and 590, 18
// rows 640 and 715, 32 rows 930 and 975; 4096 x 4096 8 rows 1,510 and 1,350, 16 rows 2,200 and
// 2,080, 24 rows 2,870 and 2,900 (2026-12).
constexpr int64_t kNibbleRows = 16;

constexpr int64_t kSpan = 128;  // values in a vector of bytes

// Whether the nibbles of w's rows can be taken in the order in which they come: whole spans of
// whole blocks.
bool by_nibbles(const FourBit& w) {
  return w.inner && w.block >= 64 && w.cols % w.block == 0 && w.cols % kSpan == 0;
}
#else
// 2048 x 2048, float32, one thread of Zen 1, in us, along rows and by panels: 16 rows 6,400 and
// 10,600; 128 rows 37,400 and 41,400; 512 rows the same; 2048 rows 15% more along rows (2026-11).
constexpr int64_t kAlongRows = 192;
constexpr int64_t kStretch = kPart<float> * kLanes;
#endif

#if defined(__AVX512F__)
constexpr int kRowsOfW = Dots<BFloat16>::kRowsOfW;

// Vector t of the four of a span has nibble t of every 16 bits; their first value is nibble 1.
constexpr int kOrder[4] = {1, 0, 3, 2};

// Rows of w that are decoded, a span of one of them at a step, while those before them are
// multiplied: lookups and products are the work of different units.
struct NibblesAhead {
  const uint8_t* bytes;  // of the first row, the others `ld` apart
  const uint8_t* later;  // likewise what is asked for, a line for a line that is read
  int64_t ld;
  const float (*scales)[kStretch / 64];
  int shift;
  const float* code;
  BFloat16* out;  // rows kStretch apart

  __attribute__((target("avx512bf16"), always_inline)) inline void at(int64_t k) const {
    decode(k / Dots<BFloat16>::kValues % kRowsOfW, k / kSpan * kSpan);
  }

  // Values [k, k + kSpan) of row j.
  __attribute__((target("avx512bf16"), always_inline)) inline void decode(int64_t j,
                                                                          int64_t k) const {
    ask_for_line(later + j * ld + k / 2);
    const __m512 values = _mm512_loadu_ps(code);
    const __m512 lower = _mm512_set1_ps(scales[j][k >> shift]);
    const __m512 upper = _mm512_set1_ps(scales[j][(k + kSpan / 2) >> shift]);
    const auto table =
        (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(values, upper), _mm512_mul_ps(values, lower));
    const __m512i q = _mm512_loadu_si512(bytes + j * ld + k / 2);
    // The upper half of a vector has the upper half of the span, and of the table.
    const __m512i four = _mm512_set1_epi16(15);
    const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t) {
      // (q >> 4 t & four) | half
      const __m512i index =
          _mm512_ternarylogic_epi32(_mm512_srli_epi16(q, 4 * t), four, half, 0xEA);
      _mm512_storeu_si512(out + j * kStretch + k + 32 * t, _mm512_permutexvar_epi16(index, table));
    }
  }
};

// `count` rows, one after the other.
__attribute__((target("avx512bf16"))) void decode_rows(const NibblesAhead& rows, int64_t count,
                                                       int64_t K) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t k = 0; k < K; k += kSpan) rows.decode(j, k);
  }
}

// product_along_rows of rows that arrange_along_rows made.
void product_of_nibbles(int64_t M, int64_t cols, const BFloat16* x, int64_t ld, const FourBit& w,
                        int64_t n, float* c) {
  using D = Dots<BFloat16>;
  const int shift = shift_of(w);
  BFloat16* decoded = part_scratch.of<BFloat16>(2 * kRowsOfW * kStretch);
  float scales[kRowsOfW][kStretch / 64];
  const auto bytes_at = [&](int64_t row, int64_t k) {
    return w.data + ((w.first + row) * w.cols + k) / 2;
  };
  for (int64_t k = 0; k < w.cols; k += kStretch) {
    const int64_t K = std::min(kStretch, w.cols - k);
    const auto left = [&](int64_t j) { return std::min<int64_t>(kRowsOfW, cols - j); };
    const auto decoded_at = [&](int64_t j) {
      return decoded + j / kRowsOfW % 2 * kRowsOfW * kStretch;
    };
    const auto rows_from = [&](int64_t j) {
      for (int64_t i = 0; i < left(j); ++i) {
        const int64_t row = w.first + n + j + i;
        scales_of(w, (row * w.cols + k) >> shift, ((K - 1) >> shift) + 1, scales[i]);
      }
      const uint8_t* later = j + kRowsOfW < cols     ? bytes_at(n + j + kRowsOfW, k)
                             : k + kStretch < w.cols ? bytes_at(n, k + kStretch)
                                                     : bytes_at(n + kPanel, 0);
      return NibblesAhead{bytes_at(n + j, k), later, w.cols / 2, scales, shift, w.code,
                          decoded_at(j)};
    };
    decode_rows(rows_from(0), left(0), K);
    for (int64_t j = 0; j < cols; j += kRowsOfW) {
      const BFloat16* own = decoded_at(j);
      if (left(j + kRowsOfW) == kRowsOfW) {
        all_dots<D, D::kRowsOfX, kRowsOfW>(M, K, x + k, ld, own, kStretch, c + j,
                                           rows_from(j + kRowsOfW));
        continue;
      }
      if (left(j) == kRowsOfW) {
        all_dots<D, D::kRowsOfX, kRowsOfW>(M, K, x + k, ld, own, kStretch, c + j);
      } else {
        for (int64_t i = 0; i < left(j); ++i) {
          all_dots<D, D::kRowsOfX, 1>(M, K, x + k, ld, own + i * kStretch, kStretch, c + j + i);
        }
      }
      if (left(j + kRowsOfW) > 0) decode_rows(rows_from(j + kRowsOfW), left(j + kRowsOfW), K);
    }
  }
}
#endif

}  // namespace

template <typename C>
bool takes_nibbles(int64_t M, const FourBit& w) {
#if defined(__AVX512F__)
  return std::is_same_v<C, BFloat16> && multiplies_along_rows<C>(M, w) && by_nibbles(w);
#else
  (void)M, (void)w;
  return false;
#endif
}

template <typename C>
void arrange_along_rows(int64_t M, int64_t K, const C* x, int64_t ld, C* out) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, BFloat16>) {
    alignas(64) uint16_t every_fourth[32];
    for (int j = 0; j < 32; ++j) every_fourth[j] = j % 16 * 4;
    const __m512i first = _mm512_load_si512(every_fourth);
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t k = 0; k < K; k += kSpan, out += kSpan) {
        __m512i q[4];
        for (int v = 0; v < 4; ++v) q[v] = _mm512_loadu_si512(x + i * ld + k + 32 * v);
#pragma GCC unroll 4
        for (int t = 0; t < 4; ++t) {
          const __m512i index = _mm512_add_epi16(first, _mm512_set1_epi16(kOrder[t]));
          const __m512i lower = _mm512_permutex2var_epi16(q[0], index, q[1]);
          const __m512i upper = _mm512_permutex2var_epi16(q[2], index, q[3]);
          _mm512_storeu_si512(out + 32 * t,
                              _mm512_inserti64x4(lower, _mm512_castsi512_si256(upper), 1));
        }
      }
    }
  }
#else
  (void)M, (void)K, (void)x, (void)ld, (void)out;
#endif
}

template <typename C>
bool multiplies_along_rows(int64_t M, const FourBit& w) {
#if defined(__AVX512F__)
  if (std::is_same_v<C, BFloat16>) {
    if (bfloat16_product() == Bfloat16Product::kFloat) return false;
    if (by_nibbles(w)) return M <= kNibbleRows;
  }
#endif
  return M <= kAlongRows && w.inner;
}

template <typename C>
void product_along_rows(int64_t M, int64_t cols, const C* x, int64_t ld, bool arranged,
                        const FourBit& w, int64_t n, float* c) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, BFloat16>) {
    if (arranged) return product_of_nibbles(M, cols, x, ld, w, n, c);
  }
#endif
  (void)arranged;
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
      for (int64_t i = 0; i < some; ++i) {
        V* row = decoded + i * kStretch;
        ask_for(w, n + j + i + D::kRowsOfW, 1, k, end);
        decode<C>(w, n + j + i, n + j + i + 1, k, end, row, kStretch);
        pad(row, count, K);
      }
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

#define LORA_KERNELS_INSTANTIATE(C)                                                           \
  template bool multiplies_along_rows<C>(int64_t, const FourBit&);                            \
  template bool takes_nibbles<C>(int64_t, const FourBit&);                                    \
  template void arrange_along_rows(int64_t, int64_t, const C*, int64_t, C*);                  \
  template void product_along_rows(int64_t, int64_t, const C*, int64_t, bool, const FourBit&, \
                                   int64_t, float*);
LORA_KERNELS_INSTANTIATE(float)
LORA_KERNELS_INSTANTIATE(BFloat16)
#undef LORA_KERNELS_INSTANTIATE

}  // namespace lora_kernels
