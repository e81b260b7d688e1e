#include "panel.h"

#include "memory.h"

namespace lora_kernels {

namespace {

template <typename C, typename T>
inline C converted(T value) {
  return C(static_cast<float>(value));
}

template <>
inline BFloat16 converted<BFloat16, float>(float value) {
  // c10's rounding as integer arithmetic without a branch, which a compiler turns into vectors.
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return BFloat16(static_cast<uint16_t>(value != value ? 0x7FC0u : rounded), BFloat16::from_bits());
}

// out[i] = from[i * stride] for i < count, zero for the rest of kCount.
template <int kCount, typename C, typename T>
inline void gather(const T* from, int64_t stride, int64_t count, C (&out)[kCount]) {
  if (stride == 1 && count >= kCount) {
    if constexpr (std::is_same_v<C, T>) {
      std::memcpy(out, from, sizeof(out));
    } else {
#pragma GCC unroll 1
      for (int i = 0; i < kCount; ++i) out[i] = converted<C>(from[i]);
    }
    return;
  }
  std::memset(static_cast<void*>(out), 0, sizeof(out));
  const int64_t n = std::min<int64_t>(count, kCount);
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = converted<C>(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = converted<C>(from[i * stride]);
  }
}

// Words that hold kLanes steps along k of one column: a float each, or a pair of bfloat16.
template <typename C, typename T>
inline Words steps_of_column(const T* from, int64_t stride_k, int64_t count) {
  C steps[kLanes * kStep<C>];
  gather<kLanes * kStep<C>>(from, stride_k, count, steps);
  return load<Words>(steps);
}

// The bfloat16 of kLanes neighbours, or of half as many, each in the low half of a word.
inline Words bits_of_lanes(const float* from) { return bfloat16_bits(load<Vec>(from)); }
inline Words bits_of_lanes(const BFloat16* from) {
  return __builtin_convertvector(load<NarrowHalfWords>(from), Words);
}
inline Words bits_of_half(const float* from) {
  return bfloat16_bits((Vec)join({load<HalfOfWords>(from), HalfOfWords{}}));
}
inline Words bits_of_half(const BFloat16* from) {
  typedef uint16_t Bits __attribute__((vector_size(kLanes)));
  return join({__builtin_convertvector(load<Bits>(from), HalfOfWords), HalfOfWords{}});
}

// One step along k of kLanes * kStep columns, as the words of a panel's row.
template <typename C, typename T>
inline void step_of_columns(const T* from, int64_t stride_k, int64_t stride_n, int64_t count_k,
                            int64_t count_n, Words (&words)[kStep<C>]) {
  constexpr int kColumns = kLanes * kStep<C>;
  if constexpr (kStep<C> == 2 && !std::is_same_v<T, Half>) {
    // As many columns as the usual ranks: there would be nothing to interleave.
    const auto pairs = [&](auto bits_of) {
      words[0] = bits_of(from);
      if (count_k > 1) words[0] |= bits_of(from + stride_k) << 16;
      words[1] = Words{};
    };
    if (stride_n == 1 && count_n == kLanes) {
      return pairs([](const T* row) { return bits_of_lanes(row); });
    }
    if (stride_n == 1 && count_n == kLanes / 2) {
      return pairs([](const T* row) { return bits_of_half(row); });
    }
  }
  C steps[kStep<C>][kColumns];
  gather<kColumns>(from, stride_n, count_n, steps[0]);
  if constexpr (kStep<C> == 2) {
    if (count_k > 1) {
      gather<kColumns>(from + stride_k, stride_n, count_n, steps[1]);
    } else {
      std::memset(static_cast<void*>(steps[1]), 0, sizeof(steps[1]));
    }
    interleave(load<HalfWords>(steps[0]), load<HalfWords>(steps[1]), words);
  } else {
    words[0] = load<Words>(steps[0]);
  }
}

// Asks for the lines of one row into the second-level cache: columns of a panel are too few for the
// machine to see a stream in them. Without it packing weight [2048, 2048] for dX takes 0.68 ms in
// bfloat16 on one core, with it 0.38 ms (Zen 5, 2026-11).
template <typename T>
inline void prefetch(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) ask_for_line(from + i);
}

constexpr int64_t kRowsAhead = 32;
// Likewise for columns whose neighbours lie along the inner axis. A decode batch of 8 adapters of
// which nothing is in the near caches takes 0.30 ms without it, 0.18 ms with it (same machine).
constexpr int64_t kBlocksAhead = 4;

// As many steps of a column as fill Part, a half or a quarter of a vector; floats as bfloat16.
template <typename C, typename Part, typename T>
inline Part part_of(const T* from) {
  if constexpr (std::is_same_v<C, T>) {
    return load<Part>(from);
  } else {
    constexpr bool kHalf = sizeof(Part) == sizeof(HalfOfWords);
    const Words bits = kHalf ? bits_of_lanes(from) : bits_of_half(from);
    const auto narrow = __builtin_convertvector(bits, NarrowHalfWords);
    return load<Part>(&narrow);
  }
}

// An inner axis that fills a part of a vector, as the usual ranks do, one column after the other:
// kParts blocks of columns share a transpose. Part is the vector that one column fills.
template <typename Part, int kParts, typename C, typename T>
void pack_short(const T* b, int64_t stride_n, int64_t N, int64_t count, int64_t width, C* panel) {
  constexpr int kSteps = kLanes / kParts, kDepth = kSteps * kStep<C>;
  for (int64_t n = 0; n < count; n += kLanes * kParts) {
    Words rows[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      Part parts[kParts];
      for (int p = 0; p < kParts; ++p) {
        const int64_t column = n + p * kLanes + i;
        parts[p] = column < N ? part_of<C, Part>(b + column * stride_n) : Part{};
      }
      rows[i] = join(parts);
    }
    transpose(rows);
    for (int p = 0; p < kParts && n + p * kLanes < count; ++p) {
      for (int s = 0; s < kSteps; ++s) {
        C* to = panel + place<C>(s * kStep<C>, n + p * kLanes, kDepth, width);
        store(to, rows[p * kSteps + s]);
      }
    }
  }
}

// Rows [0, K) of b, of which `reach` may be read ahead, and N columns, which become `count` of a
// panel of `width`.
template <typename C, typename T>
void pack(const T* b, int64_t stride_k, int64_t stride_n, int64_t K, int64_t N, int64_t reach,
          int64_t count, int64_t width, C* panel) {
  constexpr int64_t kStride = kStep<C>;
  const auto word = [&](int64_t k, int64_t n) {
    return panel + place<C>(k, n, padded<C>(K), width);
  };
  if (stride_n == 1) {
    constexpr int64_t kColumns = kLanes * kStride;
    for (int64_t k = 0; k < K; k += kStride) {
      for (int64_t s = k + kRowsAhead; s < std::min(k + kRowsAhead + kStride, reach); ++s) {
        prefetch(b + s * stride_k, N);
      }
      for (int64_t n = 0; n < count; n += kColumns) {
        Words words[kStride];
        step_of_columns<C>(b + k * stride_k + n, stride_k, 1, K - k, N - n, words);
        for (int64_t s = 0; s < kStride; ++s) {
          if (n + s * kLanes < count) store(word(k, n + s * kLanes), words[s]);
        }
      }
    }
    return;
  }
  constexpr int64_t kBlock = kLanes * kStride;
  constexpr bool kRounds = std::is_same_v<C, BFloat16> && std::is_same_v<T, float>;
  if constexpr ((std::is_same_v<C, T> || kRounds) && kLanes >= 8) {
    if (stride_k == 1 && K == kBlock / 2) {
      return pack_short<HalfOfWords, 2, C>(b, stride_n, N, count, width, panel);
    }
    if (stride_k == 1 && K == kBlock / 4) {
      return pack_short<QuarterOfWords, 4, C>(b, stride_n, N, count, width, panel);
    }
  }
  for (int64_t n = 0; n < count; n += kLanes) {
    for (int64_t k = 0; k < K; k += kBlock) {
      Words rows[kLanes];
      const T* from = b + n * stride_n + k * stride_k;
      if (stride_k == 1 && n + kLanes <= N && k + kBlock <= K) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          rows[i] = steps_of_column<C>(from + i * stride_n, 1, kBlock);
          ask_for_line(from + i * stride_n + kBlocksAhead * kBlock);
        }
      } else {
        for (int i = 0; i < kLanes; ++i) {
          rows[i] = n + i < N ? steps_of_column<C>(from + i * stride_n, stride_k, K - k) : Words{};
        }
      }
      transpose(rows);
      const int64_t steps = std::min<int64_t>(kLanes, (K - k + kStride - 1) / kStride);
      if (steps == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(word(k + i * kStride, n), rows[i]);
      } else {
        for (int64_t i = 0; i < steps; ++i) store(word(k + i * kStride, n), rows[i]);
      }
    }
  }
}

// Rows of x whose neighbours lie along the rows, not along the columns: kLanes rows at once,
// through a transpose.
template <typename C, typename T>
void copy_transposed(const T* x, int64_t stride_col, int64_t M, int64_t K, C* out, int64_t ld) {
  constexpr int64_t kStride = kStep<C>;
  for (int64_t i = 0; i < M; i += kLanes * kStride) {
    for (int64_t k = 0; k < ld; k += kLanes * kStride) {
      Words rows[kStride][kLanes];
      for (int64_t s = 0; s < kLanes; ++s) {
        Words words[kStride] = {};
        const int64_t step = k + s * kStride;
        if (step < K) {
          step_of_columns<C>(x + i + step * stride_col, stride_col, 1, K - step, M - i, words);
        }
        for (int64_t half = 0; half < kStride; ++half) rows[half][s] = words[half];
      }
      const int64_t count = std::min<int64_t>(kLanes * kStride, ld - k);
      for (int64_t half = 0; half < kStride; ++half) {
        transpose(rows[half]);
        for (int64_t j = 0; j < kLanes && i + half * kLanes + j < M; ++j) {
          std::memcpy(static_cast<void*>(out + (i + half * kLanes + j) * ld + k), &rows[half][j],
                      count * sizeof(C));
        }
      }
    }
  }
}

}  // namespace

template <typename C>
void pack_panel(const ConstMatrix& b, int64_t k0, int64_t k1, int64_t n0, C* panel) {
  with_type(b.kind, [&]<typename T>() {
    const T* from = static_cast<const T*>(b.data) + k0 * b.stride_row + n0 * b.stride_col;
    const int64_t cols = b.cols - n0, width = panel_width(cols);
    pack(from, b.stride_row, b.stride_col, k1 - k0, std::min<int64_t>(kPanel, cols), b.rows - k0,
         width, width, panel);
  });
}

template <typename C>
void pack_unit(const C* b, int64_t ld, int64_t K, int64_t N, int64_t n, int64_t width, C* panel) {
  pack(b, 1, ld, K, N, K, kPanelUnit, width, panel + place<C>(0, n, padded<C>(K), width));
}

template <typename C>
void copy_rows(const ConstMatrix& x, int64_t i0, int64_t i1, int64_t k0, int64_t k1, C* out,
               int64_t ld) {
  with_type(x.kind, [&]<typename T>() {
    if (x.stride_row == 1 && x.stride_col != 1) {
      copy_transposed(static_cast<const T*>(x.data) + i0 + k0 * x.stride_col, x.stride_col, i1 - i0,
                      k1 - k0, out, ld);
      return;
    }
    for (int64_t i = i0; i < i1; ++i, out += ld) {
      const T* from = static_cast<const T*>(x.data) + i * x.stride_row + k0 * x.stride_col;
      const int64_t stride = x.stride_col;
      if (stride == 1) {
        for (int64_t k = 0; k < k1 - k0; ++k) out[k] = converted<C>(from[k]);
      } else {
        for (int64_t k = 0; k < k1 - k0; ++k) out[k] = converted<C>(from[k * stride]);
      }
      std::fill(out + (k1 - k0), out + ld, C(0.0f));
    }
  });
}

template void pack_panel<float>(const ConstMatrix&, int64_t, int64_t, int64_t, float*);
template void pack_panel<BFloat16>(const ConstMatrix&, int64_t, int64_t, int64_t, BFloat16*);
template void pack_unit(const float*, int64_t, int64_t, int64_t, int64_t, int64_t, float*);
template void pack_unit(const BFloat16*, int64_t, int64_t, int64_t, int64_t, int64_t, BFloat16*);
template void copy_rows<float>(const ConstMatrix&, int64_t, int64_t, int64_t, int64_t, float*,
                               int64_t);
template void copy_rows<BFloat16>(const ConstMatrix&, int64_t, int64_t, int64_t, int64_t, BFloat16*,
                                  int64_t);

}  // namespace lora_kernels
