#include "product.h"

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include "memory.h"
#include "vec.h"

#if defined(__AVX512F__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace lora_kernels {

namespace {

constexpr int kMaxVectors = kRegisters.columns;

template <int kVectors>
constexpr int kRows = std::min(kRegisters.accumulators / kVectors, kRegisters.rows);

template <int kM, int kVectors>
inline void add_to(float* c, const Vec (&acc)[kM][kVectors], bool add) {
  // Otherwise the sums pass through memory.
#pragma GCC unroll 12
  for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * kPanel + j * kLanes;
      store(to, add ? load<Vec>(to) + acc[i][j] : acc[i][j]);
    }
  }
}

// Vector j of a row of b's strips, of which each is `width` wide and of `depth` rows.
template <typename C>
inline const C* vector_of(const C* b, int64_t depth, int64_t width, int64_t k, int j) {
  const int64_t strip = j * kLanes / kStrip;
  return b + strip * kStrip * depth + k * width + (j * kLanes - strip * kStrip) * kStep<C>;
}

// What is read after a tile's operands, asked for beside its products, kAtOnce lines at a step:
// requests in bursts hold up the loads that follow.
template <typename C, int kAtOnce>
struct Ahead {
  const C* rows;  // of the next tile
  int64_t lda;
  const C* panel;  // this tile's share of what follows the panel
  int64_t steps;   // until it is asked for

  static constexpr int64_t kLine = 64 / sizeof(C);

  template <int kM>
  inline void ask(int64_t k) const {
    if (k % kLine == 0) {
      for (int i = 0; i < kM; ++i) ask_for_line<3>(rows + i * lda + k);
    }
    const int64_t step = k / kStep<C>;
    if (step < steps) {
      for (int i = 0; i < kAtOnce; ++i) ask_for_line(panel + (step * kAtOnce + i) * kLine);
    }
  }
};

struct NothingAhead {
  template <int kM>
  void ask(int64_t) const {}
};

struct FloatTile {
  static constexpr bool kAsks = true;

  template <int kM, int kVectors, typename Asked = NothingAhead>
  static void run(int64_t K, int64_t depth, const float* a, int64_t lda, const float* b,
                  int64_t width, float* c, bool add, Asked ahead = {}) {
    Vec acc[kM][kVectors] = {};
    for (int64_t k = 0; k < K; ++k) {
      ahead.template ask<kM>(k);
      Vec columns[kVectors];
      for (int j = 0; j < kVectors; ++j) columns[j] = load<Vec>(vector_of(b, depth, width, k, j));
      for (int i = 0; i < kM; ++i) {
        const Vec row = broadcast(a[i * lda + k]);
        for (int j = 0; j < kVectors; ++j) acc[i][j] += row * columns[j];
      }
    }
    add_to(c, acc, add);
  }
};

// Both halves of a pair as floats, one after the other: products of bfloat16 are exact in float32.
struct PairTile {
  // With AVX2 its loop has no registers left for requests: 1.1 of the time.
  static constexpr bool kAsks = kStrip == kPanel;

  template <int kM, int kVectors, typename Asked = NothingAhead>
  static void run(int64_t K, int64_t depth, const BFloat16* a, int64_t lda, const BFloat16* b,
                  int64_t width, float* c, bool add, Asked ahead = {}) {
    Vec acc[kM][kVectors] = {};
    for (int64_t k = 0; k < K; k += 2) {
      ahead.template ask<kM>(k);
      Vec columns[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        columns[j] = lower_bfloat16(load<Words>(vector_of(b, depth, width, k, j)));
      }
      for (int i = 0; i < kM; ++i) {
        const Vec row = broadcast_of_pair<0>(a + i * lda + k);
        for (int j = 0; j < kVectors; ++j) acc[i][j] += row * columns[j];
      }
      for (int j = 0; j < kVectors; ++j) {
        columns[j] = upper_bfloat16(load<Words>(vector_of(b, depth, width, k, j)));
      }
      for (int i = 0; i < kM; ++i) {
        const Vec row = broadcast_of_pair<1>(a + i * lda + k);
        for (int j = 0; j < kVectors; ++j) acc[i][j] += row * columns[j];
      }
    }
    add_to(c, acc, add);
  }
};

// How a word of each column joins the sums: a float, or a pair of bfloat16. The order of its
// products is that of the tiles.
struct FloatStep {
  static inline Vec add(Vec sums, const float* a, Words columns) {
    return sums + broadcast(*a) * (Vec)columns;
  }
};

struct PairStep {
  static inline Vec add(Vec sums, const BFloat16* a, Words columns) {
    sums += broadcast_of_pair<0>(a) * lower_bfloat16(columns);
    return sums + broadcast_of_pair<1>(a) * upper_bfloat16(columns);
  }
};

// c += a b for kLanes columns of b that lie along the inner axis, `ldb` apart. The machine sees
// their streams without being told: asking for lines ahead costs 29 to 38 us for 1 MiB instead of
// 26 to 32 (one core of Zen 4, 2026-11).
template <typename Step, int kM, typename C>
__attribute__((always_inline)) inline void columns_in_place(int64_t K, const C* a, int64_t lda,
                                                            const C* b, int64_t ldb, float* c) {
  Vec acc[kM][1] = {};
  for (int64_t k = 0; k < K; k += kLanes * kStep<C>) {
    Words steps[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) steps[i] = load<Words>(b + i * ldb + k);
    transpose(steps);
#pragma GCC unroll 16
    for (int s = 0; s < kLanes; ++s) {
      for (int i = 0; i < kM; ++i) {
        acc[i][0] = Step::add(acc[i][0], a + i * lda + k + s * kStep<C>, steps[s]);
      }
    }
  }
  add_to(c, acc, true);
}

// Rows of b that are asked for ahead.
constexpr int64_t kRowsAhead = 32;

// The same where they lie along the rows, `ldb` apart.
template <typename Step, int kM, int kVectors, typename C>
__attribute__((always_inline)) inline void rows_in_place(int64_t K, const C* a, int64_t lda,
                                                         const C* b, int64_t ldb, float* c) {
  Vec acc[kM][kVectors] = {};
  for (int64_t k = 0; k < K; k += kStep<C>) {
    const C* row = b + k * ldb;
    for (int64_t n = 0; n < kVectors * kLanes * kStep<C>; n += 64 / sizeof(C)) {
      ask_for_line(row + kRowsAhead * ldb + n);
    }
    Words columns[kVectors];
    if constexpr (kStep<C> == 2) {
      for (int j = 0; j < kVectors; j += 2) {
        Words pairs[2];
        interleave(load<HalfWords>(row + j * kLanes), load<HalfWords>(row + ldb + j * kLanes),
                   pairs);
        columns[j] = pairs[0];
        columns[j + 1] = pairs[1];
      }
    } else {
      for (int j = 0; j < kVectors; ++j) columns[j] = load<Words>(row + j * kLanes);
    }
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        acc[i][j] = Step::add(acc[i][j], a + i * lda + k, columns[j]);
      }
    }
  }
  add_to(c, acc, true);
}

// The rows that are left, fewer than a tile's.
template <typename Tile, int kM, int kVectors, typename C>
void remaining_rows(int64_t M, int64_t K, int64_t depth, const C* a, int64_t lda, const C* b,
                    int64_t width, float* c, bool add) {
  if constexpr (kM > 0) {
    if (M == kM) {
      Tile::template run<kM, kVectors>(K, depth, a, lda, b, width, c, add);
    } else {
      remaining_rows<Tile, kM - 1, kVectors>(M, K, depth, a, lda, b, width, c, add);
    }
  }
}

// Every tile but the last asks for what is read next. 32 rows of a weight that is not in the
// caches, 2048 x 2048, take 0.88 of the time in bfloat16, 20 rows 0.87, and 512 rows of one that is
// 0.84 in float32 (Emerald Rapids, two threads, 2026-12).
template <typename Tile, int kVectors, typename C>
void all_rows(int64_t M, int64_t K, int64_t depth, const C* a, int64_t lda, const C* b,
              int64_t width, float* c, bool add) {
  constexpr int kM = kRows<kVectors>;
  if constexpr (Tile::kAsks) {
    const auto asking = [&]<int kAtOnce>(int64_t lines) {
      Ahead<C, kAtOnce> ahead{a, lda, b + K * kVectors * kLanes, ceil_div(lines, kAtOnce)};
      for (; M >= 2 * kM; M -= kM, a += kM * lda, c += kM * kPanel) {
        ahead.rows += kM * lda;
        Tile::template run<kM, kVectors>(K, depth, a, lda, b, width, c, add, ahead);
        ahead.panel += ahead.steps * kAtOnce * ahead.kLine;
      }
    };
    const int64_t tiles = M / kM;
    const int64_t lines =
        tiles > 1 ? ceil_div(K * kVectors * kLanes * sizeof(C), 64 * (tiles - 1)) : 0;
    if (lines > K / kStep<C>) {
      asking.template operator()<2>(lines);
    } else if (tiles > 1) {
      asking.template operator()<1>(lines);
    }
  }
  for (; M >= kM; M -= kM, a += kM * lda, c += kM * kPanel) {
    Tile::template run<kM, kVectors>(K, depth, a, lda, b, width, c, add);
  }
  remaining_rows<Tile, kM - 1, kVectors>(M, K, depth, a, lda, b, width, c, add);
}

// K rows of a panel of `depth`, from where b points on.
template <typename Tile, typename C>
void tiled_product(int64_t M, int64_t width, int64_t K, int64_t depth, const C* a, int64_t lda,
                   const C* b, float* c, bool add) {
  if constexpr (kStrip == kPanel) {
    switch (width / kLanes) {
      case 4:
        return all_rows<Tile, 4>(M, K, depth, a, lda, b, width, c, add);
      case 3:
        return all_rows<Tile, 3>(M, K, depth, a, lda, b, width, c, add);
      case 2:
        return all_rows<Tile, 2>(M, K, depth, a, lda, b, width, c, add);
      case 1:
        return all_rows<Tile, 1>(M, K, depth, a, lda, b, width, c, add);
    }
  } else {
    int64_t n = 0;
    const auto strips = [&]<int kStrips>() {
      for (; n + kStrips * kStrip <= width; n += kStrips * kStrip) {
        all_rows<Tile, kStrips * kMaxVectors>(M, K, depth, a, lda, b + n * depth, kStrip, c + n,
                                              add);
      }
    };
    // Few rows leave accumulators for more columns: one row of 2048 x 2048, not in the caches,
    // takes 1.6 ms, with a strip at a time 2.0 (Zen 1, AVX2, float32, one thread, 2026-12).
    if (M <= kRows<4 * kMaxVectors>) strips.template operator()<4>();
    if (M <= kRows<2 * kMaxVectors>) strips.template operator()<2>();
    strips.template operator()<1>();
  }
}

// Rows up to which reading b in place was faster than packing it (1024 x 1024, Zen 4, 2026-11).
constexpr int kFewRows = kRegisters.rows / 3 * 2;
// Likewise where pairs have to be made from two rows of b.
constexpr int kFewRowsOfPairs = 2;

template <typename Step>
struct InPlace {
  template <int kM, typename C>
  static void columns(int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb, float* c) {
    columns_in_place<Step, kM>(K, a, lda, b, ldb, c);
  }
  template <int kM, int kVectors, typename C>
  static void rows(int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb, float* c) {
    rows_in_place<Step, kM, kVectors>(K, a, lda, b, ldb, c);
  }
};

// AVX512-BF16, for functions with this attribute: the compiler's flags do not promise it.
#if defined(__AVX512F__)
#define LORA_KERNELS_DOT __attribute__((target("avx512bf16")))

struct DotTile {
  static constexpr bool kAsks = true;

  template <int kM, int kVectors, typename Asked = NothingAhead>
  LORA_KERNELS_DOT static void run(int64_t K, int64_t, const BFloat16* a, int64_t lda,
                                   const BFloat16* b, int64_t width, float* c, bool add,
                                   Asked ahead = {}) {
    __m512 acc[kM][kVectors] = {};
    for (int64_t k = 0; k < K; k += 2) {
      ahead.template ask<kM>(k);
      __m512bh columns[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        columns[j] = (__m512bh)_mm512_loadu_si512(b + k * width + 2 * j * kLanes);
      }
      for (int i = 0; i < kM; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * lda + k, sizeof(pair));
        const __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
        for (int j = 0; j < kVectors; ++j) {
          acc[i][j] = _mm512_dpbf16_ps(acc[i][j], row, columns[j]);
        }
      }
    }
#pragma GCC unroll 12
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        float* to = c + i * kPanel + j * kLanes;
        _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[i][j]) : acc[i][j]);
      }
    }
  }
};

struct DotStep {
  LORA_KERNELS_DOT static inline Vec add(Vec sums, const BFloat16* a, Words columns) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof(pair));
    return (Vec)_mm512_dpbf16_ps((__m512)sums, (__m512bh)_mm512_set1_epi32(pair),
                                 (__m512bh)columns);
  }
};

template <>
struct InPlace<DotStep> {
  template <int kM, typename C>
  LORA_KERNELS_DOT static void columns(int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb,
                                       float* c) {
    columns_in_place<DotStep, kM>(K, a, lda, b, ldb, c);
  }
  template <int kM, int kVectors, typename C>
  LORA_KERNELS_DOT static void rows(int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb,
                                    float* c) {
    rows_in_place<DotStep, kM, kVectors>(K, a, lda, b, ldb, c);
  }
};

bool has_dot() { return __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
  // Leaf 7 of CPUID, EDX: bit 22 AMX-BF16, bit 24 AMX-TILE. The system must lend the tiles as well.
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmx) == kAmx &&
         at::cpu::init_amx();
}
#else
// Never chosen.
using DotTile = PairTile;
using DotStep = PairStep;
bool has_dot() { return false; }
bool has_amx() { return false; }
#endif

// c += a b with M <= kM rows, b [K, width], by parts of K.
template <typename Kernel, int kM, typename C>
void few_rows(int64_t M, int64_t width, int64_t K, const C* a, int64_t lda, const C* b, int64_t ldb,
              bool along_columns, float* c) {
  if constexpr (kM > 0) {
    if (M < kM) return few_rows<Kernel, kM - 1>(M, width, K, a, lda, b, ldb, along_columns, c);
    const auto by_parts = [&](auto run) {
      for (int64_t k = 0; k < K; k += kPart<C>) run(k, std::min(kPart<C>, K - k));
    };
    if (along_columns) {
      for (int64_t n = 0; n < width; n += kLanes) {
        by_parts([&](int64_t k, int64_t depth) {
          Kernel::template columns<kM>(depth, a + k, lda, b + n * ldb + k, ldb, c + n);
        });
      }
      return;
    }
    constexpr int kVectors =
        kRegisters.accumulators / kM < kMaxVectors ? kMaxVectors / 2 : kMaxVectors;
    by_parts([&](int64_t k, int64_t depth) {
      const C* rows = b + k * ldb;
      int64_t n = 0;
      for (; n + kVectors * kLanes <= width; n += kVectors * kLanes) {
        Kernel::template rows<kM, kVectors>(depth, a + k, lda, rows + n, ldb, c + n);
      }
      for (; n < width; n += kStep<C> * kLanes) {
        Kernel::template rows<kM, kStep<C>>(depth, a + k, lda, rows + n, ldb, c + n);
      }
    });
  }
}

Bfloat16Product widest() {
  if (!has_dot()) return Bfloat16Product::kFloat;
  // brgemm without AMX is the same instruction as ours, behind a call.
  return has_amx() ? Bfloat16Product::kBrgemm : Bfloat16Product::kDot;
}

Bfloat16Product chosen = widest();

}  // namespace

Bfloat16Product bfloat16_product() { return chosen; }

bool set_bfloat16_product(Bfloat16Product product) {
  if (product != Bfloat16Product::kFloat && !has_dot()) return false;
  chosen = product;
  return true;
}

void product(int64_t M, int64_t width, int64_t K, int64_t depth, const float* a, int64_t lda,
             const float* b, float* c, bool add) {
  tiled_product<FloatTile>(M, width, K, depth, a, lda, b, c, add);
}

void product(int64_t M, int64_t width, int64_t K, int64_t depth, const BFloat16* a, int64_t lda,
             const BFloat16* b, float* c, bool add) {
  // brgemm rejects K == 0.
  if (chosen == Bfloat16Product::kBrgemm && K > 0) {
    at::native::cpublas::brgemm(M, width, K, lda, width, kPanel, add, a, b, c);
  } else if (chosen == Bfloat16Product::kDot) {
    tiled_product<DotTile>(M, width, K, depth, a, lda, b, c, add);
  } else {
    tiled_product<PairTile>(M, width, K, depth, a, lda, b, c, add);
  }
}

template <typename C>
bool reads_in_place(int64_t M, const ConstMatrix& b, int64_t n) {
  if (M > kFewRows || b.kind != kind_of<C> || b.rows == 0) return false;
  if (std::is_same_v<C, BFloat16> && chosen == Bfloat16Product::kBrgemm) return false;
  const int64_t cols = std::min<int64_t>(kPanel, b.cols - n);
  if (b.stride_row == 1) return cols % kPanelUnit == 0 && b.rows % (kLanes * kStep<C>) == 0;
  return b.stride_col == 1 && cols % std::max(kPanelUnit, kLanes * kStep<C>) == 0 &&
         b.rows % kStep<C> == 0 && (kStep<C> == 1 || M <= kFewRowsOfPairs);
}

template <typename C>
void product_in_place(int64_t M, int64_t width, const C* a, int64_t lda, const ConstMatrix& b,
                      int64_t n, float* c) {
  const bool along_columns = b.stride_row == 1;
  const int64_t ldb = along_columns ? b.stride_col : b.stride_row;
  const C* from = static_cast<const C*>(b.data) + n * b.stride_col;
  const auto run = [&]<typename Step>(Step) {
    few_rows<InPlace<Step>, kFewRows>(M, width, b.rows, a, lda, from, ldb, along_columns, c);
  };
  if constexpr (std::is_same_v<C, float>) {
    run(FloatStep{});
  } else if (chosen == Bfloat16Product::kDot) {
    run(DotStep{});
  } else {
    run(PairStep{});
  }
}

template bool reads_in_place<float>(int64_t, const ConstMatrix&, int64_t);
template bool reads_in_place<BFloat16>(int64_t, const ConstMatrix&, int64_t);
template void product_in_place<float>(int64_t, int64_t, const float*, int64_t, const ConstMatrix&,
                                      int64_t, float*);
template void product_in_place<BFloat16>(int64_t, int64_t, const BFloat16*, int64_t,
                                         const ConstMatrix&, int64_t, float*);

void release_products() {
  if (chosen == Bfloat16Product::kBrgemm) at::native::cpublas::brgemm_release();
}

}  // namespace lora_kernels
