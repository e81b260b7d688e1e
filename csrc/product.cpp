#include "product.h"

#include <ATen/cpu/Utils.h>
#include <ATen/native/CPUBlas.h>

#include "vec.h"

#if defined(__AVX512F__)
#include <cpuid.h>
#include <immintrin.h>
#define LORA_KERNELS_DOT __attribute__((target("avx512bf16")))
#endif

namespace lora_kernels {

namespace {

// Vectors of columns in the registers at once; their accumulators, with a vector of b for each
// column and one of a, fill the register file.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int kAccumulators = 24;
constexpr int kMaxRows = 12;
#else
constexpr int kMaxVectors = 2;
constexpr int kAccumulators = 12;
constexpr int kMaxRows = 6;
#endif

template <int kVectors>
constexpr int kRows = kAccumulators / kVectors < kMaxRows ? kAccumulators / kVectors : kMaxRows;

template <int kM, int kVectors>
inline void add_to(float* c, const Vec (&acc)[kM][kVectors], bool add) {
  for (int i = 0; i < kM; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * kPanel + j * kLanes;
      store(to, add ? load<Vec>(to) + acc[i][j] : acc[i][j]);
    }
  }
}

struct FloatTile {
  template <int kM, int kVectors>
  static void run(int64_t K, const float* a, int64_t lda, const float* b, int64_t width, float* c,
                  bool add) {
    Vec acc[kM][kVectors] = {};
    for (int64_t k = 0; k < K; ++k) {
      Vec columns[kVectors];
      for (int j = 0; j < kVectors; ++j) columns[j] = load<Vec>(b + k * width + j * kLanes);
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
  template <int kM, int kVectors>
  static void run(int64_t K, const BFloat16* a, int64_t lda, const BFloat16* b, int64_t width,
                  float* c, bool add) {
    Vec acc[kM][kVectors] = {};
    for (int64_t k = 0; k < K; k += 2) {
      Vec columns[kVectors];
      for (int j = 0; j < kVectors; ++j) {
        columns[j] = lower_bfloat16(load<Words>(b + k * width + 2 * j * kLanes));
      }
      for (int i = 0; i < kM; ++i) {
        const Vec row = broadcast(static_cast<float>(a[i * lda + k]));
        for (int j = 0; j < kVectors; ++j) acc[i][j] += row * columns[j];
      }
      for (int j = 0; j < kVectors; ++j) {
        columns[j] = upper_bfloat16(load<Words>(b + k * width + 2 * j * kLanes));
      }
      for (int i = 0; i < kM; ++i) {
        const Vec row = broadcast(static_cast<float>(a[i * lda + k + 1]));
        for (int j = 0; j < kVectors; ++j) acc[i][j] += row * columns[j];
      }
    }
    add_to(c, acc, add);
  }
};

#if defined(__AVX512F__)
struct DotTile {
  template <int kM, int kVectors>
  LORA_KERNELS_DOT static void run(int64_t K, const BFloat16* a, int64_t lda, const BFloat16* b,
                                   int64_t width, float* c, bool add) {
    __m512 acc[kM][kVectors] = {};
    for (int64_t k = 0; k < K; k += 2) {
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
    for (int i = 0; i < kM; ++i) {
      for (int j = 0; j < kVectors; ++j) {
        float* to = c + i * kPanel + j * kLanes;
        _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), acc[i][j]) : acc[i][j]);
      }
    }
  }
};
#endif

// The rows that are left, fewer than a tile's.
template <typename Tile, int kM, int kVectors, typename C>
void remaining_rows(int64_t M, int64_t K, const C* a, int64_t lda, const C* b, int64_t width,
                    float* c, bool add) {
  if constexpr (kM > 0) {
    if (M == kM) {
      Tile::template run<kM, kVectors>(K, a, lda, b, width, c, add);
    } else {
      remaining_rows<Tile, kM - 1, kVectors>(M, K, a, lda, b, width, c, add);
    }
  }
}

template <typename Tile, int kVectors, typename C>
void all_rows(int64_t M, int64_t K, const C* a, int64_t lda, const C* b, int64_t width, float* c,
              bool add) {
  constexpr int kM = kRows<kVectors>;
  for (; M >= kM; M -= kM, a += kM * lda, c += kM * kPanel) {
    Tile::template run<kM, kVectors>(K, a, lda, b, width, c, add);
  }
  remaining_rows<Tile, kM - 1, kVectors>(M, K, a, lda, b, width, c, add);
}

template <typename Tile, typename C>
void tiled_product(int64_t M, int64_t width, int64_t K, const C* a, int64_t lda, const C* b,
                   float* c, bool add) {
  int64_t n = 0;
  for (; n + kMaxVectors * kLanes <= width; n += kMaxVectors * kLanes) {
    all_rows<Tile, kMaxVectors>(M, K, a, lda, b + n * kStep<C>, width, c + n, add);
  }
#if defined(__AVX512F__)
  const C* rest = b + n * kStep<C>;
  switch ((width - n) / kLanes) {
    case 3:
      return all_rows<Tile, 3>(M, K, a, lda, rest, width, c + n, add);
    case 2:
      return all_rows<Tile, 2>(M, K, a, lda, rest, width, c + n, add);
    case 1:
      return all_rows<Tile, 1>(M, K, a, lda, rest, width, c + n, add);
  }
#else
  static_assert(kPanelUnit % (kMaxVectors * kLanes) == 0);
#endif
}

#if defined(__AVX512F__)
bool has_dot() { return __builtin_cpu_supports("avx512bf16"); }

bool has_amx() {
  // Leaf 7 of CPUID, EDX: bit 22 AMX-BF16, bit 24 AMX-TILE. The system must lend the tiles as well.
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmx) == kAmx &&
         at::cpu::init_amx();
}
#else
bool has_dot() { return false; }
bool has_amx() { return false; }
#endif

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

void product(int64_t M, int64_t width, int64_t K, const float* a, int64_t lda, const float* b,
             float* c, bool add) {
  tiled_product<FloatTile>(M, width, K, a, lda, b, c, add);
}

void product(int64_t M, int64_t width, int64_t K, const BFloat16* a, int64_t lda, const BFloat16* b,
             float* c, bool add) {
#if defined(__AVX512F__)
  // An inner axis of nothing is not for brgemm.
  if (chosen == Bfloat16Product::kBrgemm && K > 0) {
    at::native::cpublas::brgemm(M, width, K, lda, width, kPanel, add, a, b, c);
    return;
  }
  if (chosen == Bfloat16Product::kDot) {
    tiled_product<DotTile>(M, width, K, a, lda, b, c, add);
    return;
  }
#endif
  tiled_product<PairTile>(M, width, K, a, lda, b, c, add);
}

void release_products() {
  if (chosen == Bfloat16Product::kBrgemm) at::native::cpublas::brgemm_release();
}

}  // namespace lora_kernels
