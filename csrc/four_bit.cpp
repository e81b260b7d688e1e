#include "four_bit.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "memory.h"
#include "panel.h"
#include "product.h"
#include "vec.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lora_kernels {

namespace {

// The scales of `count` blocks from `first` on. The product is rounded before the offset is added,
// as bitsandbytes does: the barrier keeps the compiler from fusing them.
void scales_of(const FourBit& w, int64_t first, int64_t count, float* out) {
  if (w.absmax) {
    std::memcpy(out, w.absmax + first, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    out[i] = w.code8[w.absmax8[first + i]] * w.outer[(first + i) >> 8];
  }
  asm volatile("" : : "r"(out) : "memory");
  for (int64_t i = 0; i < count; ++i) out[i] += w.offset;
}

// The sixteen values of a block.
template <typename C>
struct Table {
  alignas(64) C values[16];

  Table(const float* code, float scale) {
    for (int i = 0; i < 16; ++i) values[i] = C(code[i] * scale);
  }

  C operator[](int q) const { return values[q]; }

  // Of whole bytes.
  void decode(const uint8_t* bytes, int64_t count, C* out) const {
    for (int64_t i = 0; i < count; ++i) {
      out[2 * i] = values[bytes[i] >> 4];
      out[2 * i + 1] = values[bytes[i] & 15];
    }
  }
};

#if defined(__AVX512F__)
template <>
struct Table<float> {
  __m512 values;

  Table(const float* code, float scale)
      : values(_mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale))) {}

  float operator[](int q) const { return ((const Vec&)values)[q]; }

  void decode(const uint8_t* bytes, int64_t count, float* out) const {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + i)));
      const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), values);
      const __m512 second = _mm512_permutexvar_ps(q, values);
      _mm512_storeu_ps(out + 2 * i, _mm512_permutex2var_ps(first, low, second));
      _mm512_storeu_ps(out + 2 * i + 16, _mm512_permutex2var_ps(first, high, second));
    }
    for (; i < count; ++i) {
      out[2 * i] = (*this)[bytes[i] >> 4];
      out[2 * i + 1] = (*this)[bytes[i] & 15];
    }
  }
};

template <>
struct Table<BFloat16> {
  __m512i values;  // twice, so that the fifth bit of an index does not matter

  Table(const float* code, float scale) {
    const Vec exact = load<Vec>(code) * scale;
    const auto narrow = __builtin_convertvector(bfloat16_bits(exact), NarrowHalfWords);
    values = _mm512_broadcast_i64x4((__m256i)narrow);
  }

  BFloat16 operator[](int q) const {
    return BFloat16(((const HalfWords&)values)[q], BFloat16::from_bits());
  }

  void decode(const uint8_t* bytes, int64_t count, BFloat16* out) const {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
      // A byte in each word of 32 bits: its high half is the index of the lower value.
      const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + i)));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi32(q, 4), _mm512_slli_epi32(q, 16));
      _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(index, values));
    }
    for (; i < count; ++i) {
      out[2 * i] = (*this)[bytes[i] >> 4];
      out[2 * i + 1] = (*this)[bytes[i] & 15];
    }
  }
};
#endif

constexpr int64_t kScales = 64;  // decoded at once

int shift_of(const FourBit& w) { return std::countr_zero(static_cast<uint64_t>(w.block)); }

// Values [f, end) of one block, by its table.
template <typename C>
void decode_run(const uint8_t* data, int64_t f, int64_t end, const Table<C>& table, C* out) {
  if (f % 2 != 0 && f < end) *out++ = table[data[f++ / 2] & 15];
  table.decode(data + f / 2, (end - f) / 2, out);
  if ((end - f) % 2 != 0) out[end - f - 1] = table[data[end / 2] >> 4];
}

}  // namespace

template <typename C>
void decode(const FourBit& w, int64_t i0, int64_t i1, int64_t j0, int64_t j1, C* out, int64_t ld) {
  if (j0 >= j1) return;
  const int shift = shift_of(w);
  float scales[kScales];
  for (int64_t i = i0; i < i1; ++i, out += ld) {
    int64_t f = i * w.cols + j0;
    const int64_t end = i * w.cols + j1, last = (end - 1) >> shift;
    C* to = out;
    for (int64_t first = f >> shift; first <= last; first += kScales) {
      const int64_t count = std::min(kScales, last + 1 - first);
      scales_of(w, first, count, scales);
      for (int64_t b = 0; b < count; ++b) {
        const int64_t stop = std::min(end, (first + b + 1) << shift);
        decode_run(w.data, f, stop, Table<C>(w.code, scales[b]), to);
        to += stop - f;
        f = stop;
      }
    }
  }
}

template <typename C>
void decode_all(const FourBit& w, C* out) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, w.cols));
  at::parallel_for(0, w.rows, grain, [&](int64_t begin, int64_t end) {
    decode(w, begin, end, 0, w.cols, out + begin * w.cols, w.cols);
  });
}

template <typename C>
void pack_panel(const FourBit& w, int64_t k0, int64_t k1, int64_t n0, C* panel) {
  const int64_t K = k1 - k0, cols = std::min<int64_t>(kPanel, w.columns() - n0);
  C* part = part_scratch.of<C>(kPart<C> * kPanel);
  const auto packed = [&](int64_t stride_k, int64_t stride_n) {
    pack_panel<C>(ConstMatrix{part, kind_of<C>, K, cols, stride_k, stride_n}, 0, K, 0, panel);
  };
  if (w.inner) {
    decode(w, n0, n0 + cols, k0, k1, part, kPart<C>);
    packed(1, kPart<C>);
  } else {
    decode(w, k0, k1, n0, n0 + cols, part, kPanel);
    packed(kPanel, 1);
  }
}

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
  const uint8_t* bytes = w.data + row * w.cols / 2;
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
  const uint8_t* bytes = w.data + row * w.cols / 2;
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
      scales_of(w, (n + j + i) * K / w.block, blocks, scales + i * blocks);
    }
  };
  int64_t j = 0;
  for (; j + 4 <= cols; j += 4) {
    read(j, 4);
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

#define LORA_KERNELS_INSTANTIATE(C)                                                      \
  template void decode(const FourBit&, int64_t, int64_t, int64_t, int64_t, C*, int64_t); \
  template void pack_panel(const FourBit&, int64_t, int64_t, int64_t, C*);               \
  template bool decodes_in_registers<C>(int64_t, const FourBit&);                        \
  template void arrange_rows(int64_t, int64_t, const C*, int64_t, C*);                   \
  template void product_of_few(int64_t, int64_t, const C*, const FourBit&, int64_t, float*);
LORA_KERNELS_INSTANTIATE(float)
LORA_KERNELS_INSTANTIATE(BFloat16)
#undef LORA_KERNELS_INSTANTIATE
template void decode_all(const FourBit&, float*);
template void decode_all(const FourBit&, BFloat16*);
template void decode_all(const FourBit&, Half*);

}  // namespace lora_kernels
