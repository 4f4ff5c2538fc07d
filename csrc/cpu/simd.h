// Several vector registers worked on side by side, for the level this file is compiled for: what the generator of
// directions needs beyond plain loops.
//
// Each csrc/cpu/*.cpp that does arithmetic is compiled once per instruction set (CMakeLists.txt). A chain of dependent
// operations is long here, so one register would leave the CPU waiting: kWide registers go through it together.
#pragma once

#include <cstdint>
#include <cstring>

#include "adazeta/fma.h"
#include "adazeta/macros.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define ADAZETA_SIMD_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define ADAZETA_SIMD_BYTES 32
#endif

#if defined(ADAZETA_SIMD_BYTES)

namespace adazeta {
namespace {

typedef float FloatRegister __attribute__((vector_size(ADAZETA_SIMD_BYTES)));
typedef int32_t IntRegister __attribute__((vector_size(ADAZETA_SIMD_BYTES)));
typedef uint32_t WordRegister __attribute__((vector_size(ADAZETA_SIMD_BYTES)));
// Philox multiplies 32 x 32 -> 64 bits: words lie in the low halves of these, where one instruction gives both product
// halves; the high halves hold rubbish that no later multiplication reads.
typedef uint64_t PairRegister __attribute__((vector_size(ADAZETA_SIMD_BYTES)));

constexpr int kLanes = ADAZETA_SIMD_BYTES / 4;  // 32-bit numbers in a register
constexpr int kBlocks = kLanes / 2;             // Philox blocks in a register
constexpr int kWide = ADAZETA_SIMD_BYTES == 64 ? 4 : 2;

struct WideFloats {
  FloatRegister r[kWide];
};
struct WideWords {
  WordRegister r[kWide];
};

#define ADAZETA_WIDE(Result, Left, Right, name, left, operation, right) \
  ADAZETA_HD Result name(Left a, Right b) {                             \
    Result result;                                                      \
    for (int i = 0; i < kWide; ++i) result.r[i] = left operation right; \
    return result;                                                      \
  }
ADAZETA_WIDE(WideFloats, WideFloats, WideFloats, operator*, a.r[i], *, b.r[i])
ADAZETA_WIDE(WideFloats, WideFloats, float, operator*, a.r[i], *, b)
ADAZETA_WIDE(WideFloats, float, WideFloats, operator-, a, -, b.r[i])
ADAZETA_WIDE(WideWords, WideWords, WideWords, operator-, a.r[i], -, b.r[i])
ADAZETA_WIDE(WideWords, uint32_t, WideWords, operator-, a, -, b.r[i])
ADAZETA_WIDE(WideWords, WideWords, uint32_t, operator+, a.r[i], +, b)
ADAZETA_WIDE(WideWords, WideWords, uint32_t, operator&, a.r[i], &, b)
ADAZETA_WIDE(WideWords, WideWords, int, operator>>, a.r[i], >>, b)
ADAZETA_WIDE(WideWords, WideWords, int, operator<<, a.r[i], <<, b)
#undef ADAZETA_WIDE

#if ADAZETA_SIMD_BYTES == 64

ADAZETA_HD FloatRegister fma(FloatRegister a, FloatRegister b, FloatRegister c) { return _mm512_fmadd_ps(a, b, c); }
ADAZETA_HD FloatRegister square_root(FloatRegister a) { return _mm512_sqrt_ps(a); }
ADAZETA_HD FloatRegister choose_by_bit_30(WordRegister v, FloatRegister set, FloatRegister clear) {
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask((__m512i)v, _mm512_set1_epi32(1 << 30)), clear, set);
}
ADAZETA_HD FloatRegister flip_by_bit_31(WordRegister v, FloatRegister x) {
  return (FloatRegister)_mm512_ternarylogic_epi32((__m512i)x, (__m512i)v, _mm512_set1_epi32(INT32_MIN), 0x78);
}
ADAZETA_HD PairRegister multiply_low_halves(PairRegister a, PairRegister b) {
  return (PairRegister)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
ADAZETA_HD PairRegister xor3(PairRegister a, PairRegister b, PairRegister c) {
  return (PairRegister)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
}
// Low halves of a, with those of b above them; and the same of high halves.
ADAZETA_HD PairRegister merge_low(PairRegister a, PairRegister b) {
  return (PairRegister)_mm512_mask_moveldup_ps((__m512)a, 0xaaaa, (__m512)b);
}
ADAZETA_HD PairRegister merge_high(PairRegister a, PairRegister b) {
  return (PairRegister)_mm512_mask_movehdup_ps((__m512)b, 0x5555, (__m512)a);
}
// a0 b0 a1 b1 ... of the lower and of the upper halves.
template <class Register>
ADAZETA_HD void interleave(Register a, Register b, Register* low, Register* high) {
  const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  *low = (Register)_mm512_permutex2var_epi32((__m512i)a, first, (__m512i)b);
  *high = (Register)_mm512_permutex2var_epi32((__m512i)a, second, (__m512i)b);
}

#else

ADAZETA_HD FloatRegister fma(FloatRegister a, FloatRegister b, FloatRegister c) { return _mm256_fmadd_ps(a, b, c); }
ADAZETA_HD FloatRegister square_root(FloatRegister a) { return _mm256_sqrt_ps(a); }
ADAZETA_HD FloatRegister choose_by_bit_30(WordRegister v, FloatRegister set, FloatRegister clear) {
  return _mm256_blendv_ps(clear, set, (__m256)(v << 1));
}
ADAZETA_HD FloatRegister flip_by_bit_31(WordRegister v, FloatRegister x) {
  return (FloatRegister)((WordRegister)x ^ (v & 0x80000000u));
}
ADAZETA_HD PairRegister multiply_low_halves(PairRegister a, PairRegister b) {
  return (PairRegister)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
ADAZETA_HD PairRegister xor3(PairRegister a, PairRegister b, PairRegister c) { return a ^ b ^ c; }
ADAZETA_HD PairRegister merge_low(PairRegister a, PairRegister b) {
  return (PairRegister)_mm256_blend_ps((__m256)a, _mm256_moveldup_ps((__m256)b), 0xaa);
}
ADAZETA_HD PairRegister merge_high(PairRegister a, PairRegister b) {
  return (PairRegister)_mm256_blend_ps(_mm256_movehdup_ps((__m256)a), (__m256)b, 0xaa);
}
template <class Register>
ADAZETA_HD void interleave(Register a, Register b, Register* low, Register* high) {
  const __m256 x = _mm256_unpacklo_ps((__m256)a, (__m256)b), y = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  *low = (Register)_mm256_permute2f128_ps(x, y, 0x20);
  *high = (Register)_mm256_permute2f128_ps(x, y, 0x31);
}

#endif

ADAZETA_HD PairRegister high_half(PairRegister a) { return a >> 32; }
ADAZETA_HD PairRegister broadcast(uint64_t x) { return x - PairRegister{}; }

// The arithmetic of normal.h on kWide registers.
struct WideLanes {
  using F = WideFloats;
  using U = WideWords;
  static ADAZETA_HD F set(float x) {
    F result;
    for (int i = 0; i < kWide; ++i) result.r[i] = x - FloatRegister{};
    return result;
  }
  static ADAZETA_HD F fma(F a, F b, F c) {
    for (int i = 0; i < kWide; ++i) a.r[i] = adazeta::fma(a.r[i], b.r[i], c.r[i]);
    return a;
  }
  static ADAZETA_HD F square_root(F a) {
    for (int i = 0; i < kWide; ++i) a.r[i] = adazeta::square_root(a.r[i]);
    return a;
  }
  static ADAZETA_HD F from_integer(U a) {
    F result;
    for (int i = 0; i < kWide; ++i) result.r[i] = __builtin_convertvector((IntRegister)a.r[i], FloatRegister);
    return result;
  }
  static ADAZETA_HD U bits(F a) { return adazeta::bit_cast<U>(a); }
  static ADAZETA_HD F from_bits(U a) { return adazeta::bit_cast<F>(a); }
  static ADAZETA_HD F choose_by_bit_30(U v, F set, F clear) {
    for (int i = 0; i < kWide; ++i) set.r[i] = adazeta::choose_by_bit_30(v.r[i], set.r[i], clear.r[i]);
    return set;
  }
  static ADAZETA_HD F flip_by_bit_31(U v, F x) {
    for (int i = 0; i < kWide; ++i) x.r[i] = adazeta::flip_by_bit_31(v.r[i], x.r[i]);
    return x;
  }
};

}  // namespace
}  // namespace adazeta

#endif
