#include "four_bit.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "memory.h"
#include "panel.h"
#include "product.h"
#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lora_kernels {

void scales_of(const FourBit& w, int64_t first, int64_t count, float* out) {
  if (w.absmax) {
    std::memcpy(out, w.absmax + first, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    // The product is rounded before the offset is added, as bitsandbytes does: the barrier keeps
    // the compiler from fusing them. One by one: what was stored so is slow to load as vectors.
    auto bits = std::bit_cast<uint32_t>(w.code8[w.absmax8[first + i]] * w.outer[(first + i) >> 8]);
    asm volatile("" : "+r"(bits));
    out[i] = std::bit_cast<float>(bits) + w.offset;
  }
}

void ask_for(const FourBit& w, int64_t row, int64_t count, int64_t j, int64_t end) {
  for (int64_t i = row; i < std::min(row + count, w.rows); ++i) {
    const uint8_t* bytes = w.data + (w.first + i) * w.cols / 2;
    for (int64_t at = j / 2; at < end / 2; at += 64) ask_for_line(bytes + at);
  }
}

namespace {

// Bytes of whole vectors, on every machine.
constexpr int64_t kVector = 16;

// Decodes a format's bytes: code times the block's scale in float32, rounded once to C. Out is C,
// or float for the same values wider. `count` is a multiple of kVector, all of one block.
template <typename C>
class Codes {
 public:
  explicit Codes(const float* code) : code_(code) {}

  C value(int q, float scale) const { return C(code_[q] * scale); }

  template <typename Out>
  void decode(const uint8_t* bytes, int64_t count, float scale, Out* out) const {
    C values[16];
    for (int i = 0; i < 16; ++i) values[i] = value(i, scale);
    for (int64_t i = 0; i < count; ++i) {
      out[2 * i] = values[bytes[i] >> 4];
      out[2 * i + 1] = values[bytes[i] & 15];
    }
  }

 private:
  const float* code_;
};

#if defined(__AVX512F__)
template <>
class Codes<float> {
 public:
  explicit Codes(const float* code) : code_(_mm512_loadu_ps(code)) {}

  float value(int q, float scale) const { return ((const Vec&)code_)[q] * scale; }

  void decode(const uint8_t* bytes, int64_t count, float scale, float* out) const {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 values = _mm512_mul_ps(code_, _mm512_set1_ps(scale));
    for (int64_t i = 0; i < count; i += kVector) {
      const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + i)));
      const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(q, 4), values);
      const __m512 second = _mm512_permutexvar_ps(q, values);
      _mm512_storeu_ps(out + 2 * i, _mm512_permutex2var_ps(first, low, second));
      _mm512_storeu_ps(out + 2 * i + 16, _mm512_permutex2var_ps(first, high, second));
    }
  }

 private:
  __m512 code_;
};

template <>
class Codes<BFloat16> {
 public:
  explicit Codes(const float* code) : code_(load<Vec>(code)) {}

  BFloat16 value(int q, float scale) const { return BFloat16(code_[q] * scale); }

  void decode(const uint8_t* bytes, int64_t count, float scale, BFloat16* out) const {
    const Words bits = bfloat16_bits(code_ * scale);
    look_up((__m256i) __builtin_convertvector(bits, NarrowHalfWords), bytes, count, out);
  }

 protected:
  static inline void look_up(__m256i sixteen, const uint8_t* bytes, int64_t count, BFloat16* out) {
    // Twice, so that the fifth bit of an index does not matter.
    const __m512i values = _mm512_broadcast_i64x4(sixteen);
    for (int64_t i = 0; i < count; i += kVector) {
      // A byte in each word of 32 bits: its high half is the index of the lower value.
      const __m512i q = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + i)));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi32(q, 4), _mm512_slli_epi32(q, 16));
      _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(index, values));
    }
  }

  Vec code_;
};

// The same where AVX512-BF16 rounds.
class DotCodes : public Codes<BFloat16> {
 public:
  using Codes::Codes;

  __attribute__((target("avx512bf16"))) void decode(const uint8_t* bytes, int64_t count,
                                                    float scale, BFloat16* out) const {
    look_up((__m256i)_mm512_cvtneps_pbh((__m512)(code_ * scale)), bytes, count, out);
  }
};

#elif defined(__AVX2__)
// A byte shuffle looks 32 nibbles up at once: a table for each byte of the values, once in each
// half of a register, as the shuffle does not cross them.
using Bytes = __m256i;

inline Bytes both_halves(__m128i table) { return _mm256_set_m128i(table, table); }

// The 32 nibbles of 16 bytes in the order of their values; value 16 begins the upper half.
inline Bytes nibbles(const uint8_t* bytes) {
  const __m128i q = _mm_loadu_si128((const __m128i*)bytes), mask = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(q, 4), mask), second = _mm_and_si128(q, mask);
  return _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
}

// The halves are 16 values apart.
template <typename Out>
inline void store_halves(Out* out, __m256i v) {
  _mm_storeu_si128((__m128i*)out, _mm256_castsi256_si128(v));
  _mm_storeu_si128((__m128i*)(out + 16), _mm256_extracti128_si256(v, 1));
}

template <>
class Codes<float> {
 public:
  explicit Codes(const float* code) : code_(code) {
    for (int b = 0; b < 4; ++b) {
      alignas(16) uint8_t table[16];
      for (int q = 0; q < 16; ++q) table[q] = std::bit_cast<uint32_t>(code[q]) >> 8 * b;
      tables_[b] = both_halves(_mm_load_si128((const __m128i*)table));
    }
  }

  float value(int q, float scale) const { return code_[q] * scale; }

  void decode(const uint8_t* bytes, int64_t count, float scale, float* out) const {
    const __m256 factor = _mm256_set1_ps(scale);
    for (int64_t i = 0; i < count; i += kVector, out += 2 * kVector) {
      const Bytes q = nibbles(bytes + i);
      const Bytes b0 = _mm256_shuffle_epi8(tables_[0], q), b1 = _mm256_shuffle_epi8(tables_[1], q);
      const Bytes b2 = _mm256_shuffle_epi8(tables_[2], q), b3 = _mm256_shuffle_epi8(tables_[3], q);
      const Bytes low[2] = {_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)};
      const Bytes high[2] = {_mm256_unpacklo_epi8(b2, b3), _mm256_unpackhi_epi8(b2, b3)};
      for (int h = 0; h < 2; ++h) {
        const auto a = (__m256)_mm256_unpacklo_epi16(low[h], high[h]);
        const auto b = (__m256)_mm256_unpackhi_epi16(low[h], high[h]);
        store_halves(out + 8 * h, (__m256i)_mm256_mul_ps(a, factor));
        store_halves(out + 8 * h + 4, (__m256i)_mm256_mul_ps(b, factor));
      }
    }
  }

 private:
  const float* code_;
  Bytes tables_[4];
};

template <>
class Codes<BFloat16> {
 public:
  explicit Codes(const float* code) : code_(code) {}

  BFloat16 value(int q, float scale) const { return BFloat16(code_[q] * scale); }

  template <typename Out>
  void decode(const uint8_t* bytes, int64_t count, float scale, Out* out) const {
    const auto words = [&](int i) { return (__m256i)bfloat16_bits(load<Vec>(code_ + i) * scale); };
    // Packing works on halves: values 0 to 3, 8 to 11, 4 to 7, 12 to 15.
    const __m256i packed = _mm256_packus_epi32(words(0), words(8));
    const __m256i values = _mm256_permute4x64_epi64(packed, 0xD8), mask = _mm256_set1_epi16(255);
    const __m256i halves = _mm256_permute4x64_epi64(
        _mm256_packus_epi16(_mm256_and_si256(values, mask), _mm256_srli_epi16(values, 8)), 0xD8);
    const Bytes low = both_halves(_mm256_castsi256_si128(halves));
    const Bytes high = both_halves(_mm256_extracti128_si256(halves, 1));
    for (int64_t i = 0; i < count; i += kVector, out += 2 * kVector) {
      const Bytes q = nibbles(bytes + i);
      const Bytes b0 = _mm256_shuffle_epi8(low, q), b1 = _mm256_shuffle_epi8(high, q);
      const Bytes pairs[2] = {_mm256_unpacklo_epi8(b0, b1), _mm256_unpackhi_epi8(b0, b1)};
      for (int h = 0; h < 2; ++h) {
        if constexpr (std::is_same_v<Out, float>) {
          const __m256i zero = _mm256_setzero_si256();
          store_halves(out + 8 * h, _mm256_unpacklo_epi16(zero, pairs[h]));
          store_halves(out + 8 * h + 4, _mm256_unpackhi_epi16(zero, pairs[h]));
        } else {
          store_halves(out + 8 * h, pairs[h]);
        }
      }
    }
  }

 private:
  const float* code_;
};
#endif

constexpr int64_t kScales = 64;  // decoded at once

// Values [f, end) of one block.
template <typename Values, typename Out>
void decode_run(const uint8_t* data, int64_t f, int64_t end, const Values& codes, float scale,
                Out* out) {
  if (f % 2 != 0 && f < end) *out++ = codes.value(data[f++ / 2] & 15, scale);
  const int64_t whole = (end - f) / 2 / kVector * kVector;
  codes.decode(data + f / 2, whole, scale, out);
  for (out += 2 * whole, f += 2 * whole; f < end; ++f) {
    *out++ = codes.value(data[f / 2] >> (f % 2 ? 0 : 4) & 15, scale);
  }
}

// Whole blocks of `size` bytes. Those of 64 values, which most weights have, without a loop.
template <typename Values, typename Out>
__attribute__((always_inline)) inline void decode_blocks(const Values& codes, const uint8_t* bytes,
                                                         int64_t count, int64_t size,
                                                         const float* scales, Out* out) {
  if (size == 32) {
    for (int64_t b = 0; b < count; ++b) codes.decode(bytes + 32 * b, 32, scales[b], out + 64 * b);
    return;
  }
  for (int64_t b = 0; b < count; ++b) {
    codes.decode(bytes + size * b, size, scales[b], out + 2 * size * b);
  }
}

template <typename Values, typename Out>
__attribute__((always_inline)) inline void decode_rows(const Values& codes, const FourBit& w,
                                                       int64_t i0, int64_t i1, int64_t j0,
                                                       int64_t j1, Out* out, int64_t ld) {
  if (j0 >= j1) return;
  const int shift = shift_of(w);
  float scales[kScales];
  for (int64_t i = i0; i < i1; ++i, out += ld) {
    int64_t f = (w.first + i) * w.cols + j0;
    const int64_t end = f + j1 - j0, last = (end - 1) >> shift;
    Out* to = out;
    for (int64_t first = f >> shift; first <= last; first += kScales) {
      const int64_t count = std::min(kScales, last + 1 - first);
      scales_of(w, first, count, scales);
      int64_t b = 0;
      if ((f & (w.block - 1)) == 0 && w.block >= 2 * kVector) {
        b = std::min(count, (end - f) >> shift);
        decode_blocks(codes, w.data + f / 2, b, w.block / 2, scales, to);
        to += b * w.block;
        f += b * w.block;
      }
      for (; b < count; ++b) {
        const int64_t stop = std::min(end, (first + b + 1) << shift);
        decode_run(w.data, f, stop, codes, scales[b], to);
        to += stop - f;
        f = stop;
      }
    }
  }
}

#if defined(__AVX512F__)
__attribute__((target("avx512bf16"))) void decode_by_dot(const FourBit& w, int64_t i0, int64_t i1,
                                                         int64_t j0, int64_t j1, BFloat16* out,
                                                         int64_t ld) {
  decode_rows(DotCodes(w.code), w, i0, i1, j0, j1, out, ld);
}

// Whether look_up_unit can have columns [k0, k1) of any kPanelUnit rows of w: whole blocks.
bool looks_up_units(const FourBit& w, int64_t k0, int64_t k1) {
  static const bool has_bytes = __builtin_cpu_supports("avx512vbmi");
  return has_bytes && bfloat16_product() != Bfloat16Product::kFloat && w.block >= 64 &&
         w.cols % w.block == 0 && k0 % 64 == 0 && k1 % 64 == 0;
}

// As decode and pack_unit: columns [k0, k1) of kPanelUnit rows of w from `row` on, from column n on
// of a panel of `width` columns. A lookup takes its values from four rows' tables, so that it puts
// four rows and four steps side by side, and of a transpose the half is left.
__attribute__((target("avx512bf16,avx512vbmi"))) void look_up_unit(const FourBit& w, int64_t row,
                                                                   int64_t k0, int64_t k1,
                                                                   int64_t n, int64_t width,
                                                                   BFloat16* panel) {
  const int shift = shift_of(w);
  const int64_t first = k0 >> shift, count = ((k1 - 1) >> shift) + 1 - first;
  float scales[kPanelUnit][kPart<BFloat16> / 64];
  for (int64_t i = 0; i < kPanelUnit; ++i) {
    scales_of(w, ((w.first + row + i) * w.cols >> shift) + first, count, scales[i]);
  }
  const __m512 code = _mm512_loadu_ps(w.code);
  // Bits 4 and 5 of a value's index are its row in a group of four.
  const __m512i four = _mm512_set1_epi8(15);
  const __m512i rows =
      _mm512_set_epi64(0x3030303030303030, 0x3030303030303030, 0x2020202020202020,
                       0x2020202020202020, 0x1010101010101010, 0x1010101010101010, 0, 0);
  // Step s of four rows as words, from the lower and, by bit 6, the higher halves of their pairs.
  alignas(64) uint8_t order[64];
  for (int i = 0; i < 64; ++i) order[i] = i / 4 % 4 * 16 + i / 16 + i / 2 % 2 * 64;
  const __m512i steps = _mm512_load_si512(order);
  const int64_t ld = w.cols / 2;
  const uint8_t* bytes = w.data + (w.first + row) * ld + k0 / 2;
  for (int64_t k = k0; k < k1; k += 64, bytes += 32) {
    const int64_t b = (k >> shift) - first;
    __m512i tables[4][2];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const auto values = [&](int i) {
          return _mm512_mul_ps(code, _mm512_set1_ps(scales[4 * g + 2 * h + i][b]));
        };
        tables[g][h] = (__m512i)_mm512_cvtne2ps_pbh(values(1), values(0));
      }
    }
    for (int half = 0; half < 2; ++half) {
      __m512i lower[4], higher[4];
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        const auto part = [&](int i) {
          const uint8_t* from = bytes + (4 * g + i) * ld + 16 * half;
          if (half == 0) ask_for_line(from + kPanel * ld);
          return _mm_loadu_si128((const __m128i*)from);
        };
        __m512i q = _mm512_castsi128_si512(part(0));
        q = _mm512_inserti32x4(q, part(1), 1);
        q = _mm512_inserti32x4(q, part(2), 2);
        q = _mm512_inserti32x4(q, part(3), 3);
        // (q & four) | rows
        lower[g] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(q, 4), four, rows, 0xEA);
        higher[g] = _mm512_ternarylogic_epi32(q, four, rows, 0xEA);
      }
      BFloat16* out = panel + place<BFloat16>(k - k0 + 32 * half, n, k1 - k0, width);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j, out += 8 * width) {
        const __m512i from = _mm512_add_epi8(steps, _mm512_set1_epi8(4 * j));
        __m512i words[4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
          const __m512i index = _mm512_permutex2var_epi8(lower[g], from, higher[g]);
          words[g] = _mm512_permutex2var_epi16(tables[g][0], index, tables[g][1]);
        }
        const __m512i a = _mm512_shuffle_i32x4(words[0], words[1], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(words[2], words[3], 0x44);
        const __m512i d = _mm512_shuffle_i32x4(words[0], words[1], 0xEE);
        const __m512i e = _mm512_shuffle_i32x4(words[2], words[3], 0xEE);
        _mm512_storeu_si512(out, _mm512_shuffle_i32x4(a, c, 0x88));
        _mm512_storeu_si512(out + 2 * width, _mm512_shuffle_i32x4(a, c, 0xDD));
        _mm512_storeu_si512(out + 4 * width, _mm512_shuffle_i32x4(d, e, 0x88));
        _mm512_storeu_si512(out + 6 * width, _mm512_shuffle_i32x4(d, e, 0xDD));
      }
    }
  }
}
#endif

}  // namespace

template <typename C, typename Out>
void decode(const FourBit& w, int64_t i0, int64_t i1, int64_t j0, int64_t j1, Out* out,
            int64_t ld) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, BFloat16>) {
    if (bfloat16_product() != Bfloat16Product::kFloat) {
      return decode_by_dot(w, i0, i1, j0, j1, out, ld);
    }
  }
#endif
  decode_rows(Codes<C>(w.code), w, i0, i1, j0, j1, out, ld);
}

template <typename C>
void decode_all(const FourBit& w, C* out) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, w.cols));
  at::parallel_for(0, w.rows, grain, [&](int64_t begin, int64_t end) {
    decode<C>(w, begin, end, 0, w.cols, out + begin * w.cols, w.cols);
  });
}

// Rows that are decoded between two requests for as many of the next panel. Requests for 64 lines
// at once have what follows wait for them: 8 cold rows of 4096 x 4096 in bfloat16 take 1,980 us
// with them and without any, 1,510 with a line for every line that is read (two threads of Zen 4,
// 2026-12).
constexpr int64_t kRowsAtOnce = 4;

template <typename C>
void pack_panel(const FourBit& w, int64_t k0, int64_t k1, int64_t n0, C* panel) {
  const int64_t K = k1 - k0, cols = std::min<int64_t>(kPanel, w.columns() - n0);
  if (!w.inner) {
    C* part = part_scratch.of<C>(kPart<C> * kPanel);
    for (int64_t k = k0; k < k1; k += kRowsAtOnce) {
      ask_for(w, k, kRowsAtOnce, n0 + kPanel, n0 + 2 * kPanel);
      decode<C>(w, k, std::min(k1, k + kRowsAtOnce), n0, n0 + cols, part + (k - k0) * kPanel,
                kPanel);
    }
    pack_panel<C>(ConstMatrix{part, kind_of<C>, K, cols, kPanel, 1}, 0, K, 0, panel);
    return;
  }
  // As many columns at a time as stay in the nearest cache, while those of the next panel come.
  C* part = part_scratch.of<C>(kPart<C> * kPanelUnit);
  for (int64_t j = 0; j < cols; j += kPanelUnit) {
    const int64_t n = n0 + j, some = std::min<int64_t>(kPanelUnit, cols - j);
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<C, BFloat16>) {
      if (some == kPanelUnit && looks_up_units(w, k0, k1)) {
        look_up_unit(w, n, k0, k1, j, panel_width(cols), panel);
        continue;
      }
    }
#endif
    for (int64_t i = 0; i < some; i += kRowsAtOnce) {
      ask_for(w, n + kPanel + i, kRowsAtOnce, k0, k1);
      decode<C>(w, n + i, n + std::min(some, i + kRowsAtOnce), k0, k1, part + i * kPart<C>,
                kPart<C>);
    }
    pack_unit(part, kPart<C>, K, some, j, panel_width(cols), panel);
  }
}

#define LORA_KERNELS_INSTANTIATE(C)                                                         \
  template void decode<C>(const FourBit&, int64_t, int64_t, int64_t, int64_t, C*, int64_t); \
  template void pack_panel(const FourBit&, int64_t, int64_t, int64_t, C*);                  \
  template void decode_all(const FourBit&, C*);
LORA_KERNELS_INSTANTIATE(float)
LORA_KERNELS_INSTANTIATE(BFloat16)
#undef LORA_KERNELS_INSTANTIATE
template void decode_all(const FourBit&, Half*);
#if !defined(__AVX512F__)
template void decode<BFloat16>(const FourBit&, int64_t, int64_t, int64_t, int64_t, float*, int64_t);
#endif

}  // namespace lora_kernels
