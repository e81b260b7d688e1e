// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11).
#pragma once

#include <cstdint>

#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace lora_kernels {

// A word sits in the low half of a 64-bit lane, and the high half is anything: the 32 x 32 -> 64
// multiplication of every x86 vector unit reads just that half and fills the lane with both halves
// of the product. Words packed as 32-bit lanes cost shuffles around every product: x * mask for
// float32 [512, 2048] on one core takes 1.18 ms that way and 0.48 ms this way with AVX2, 0.51 and
// 0.29 ms with AVX-512 (g++ 12, Zen 5, 2026-11).
typedef uint64_t PhiloxLanes __attribute__((vector_size(4 * kLanes)));

inline PhiloxLanes multiply_low_halves(PhiloxLanes a, uint32_t b) {
#if defined(__AVX512F__)
  // The form without a mask makes g++ 12 warn of an uninitialised variable in its own header.
  return (PhiloxLanes)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (PhiloxLanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__)
  return (PhiloxLanes)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

struct PhiloxWords {
  PhiloxLanes c0, c1, c2, c3;
};

// Of kChains counters a lane at once: a round waits for its own multiplications, and not for the
// other chains'.
template <int kChains>
inline void philox4x32_10(PhiloxWords (&counters)[kChains], uint32_t k0, uint32_t k1) {
#pragma GCC unroll 10
  for (uint32_t round = 0; round < 10; ++round) {
#pragma GCC unroll 8
    for (int i = 0; i < kChains; ++i) {
      PhiloxWords& c = counters[i];
      const PhiloxLanes product0 = multiply_low_halves(c.c0, 0xD2511F53u);
      const PhiloxLanes product1 = multiply_low_halves(c.c2, 0xCD9E8D57u);
      c.c0 = (product1 >> 32) ^ c.c1 ^ (k0 + round * 0x9E3779B9u);
      c.c1 = product1;
      c.c2 = (product0 >> 32) ^ c.c3 ^ (k1 + round * 0xBB67AE85u);
      c.c3 = product0;
    }
  }
}

}  // namespace lora_kernels
