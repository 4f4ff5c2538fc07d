// A vector of float32 as wide as the level has, for the TT ops; kVec lanes, one where neither x86 nor NEON is there.
//
// The types are the compiler's own vectors, so +, -, *, / and < work on them as they are.
#pragma once

#include <cstdint>
#include <cstring>

#include "adazeta/activation.h"
#include "adazeta/dtype.h"
#include "adazeta/macros.h"
#include "adazeta/params.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace adazeta {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

#if defined(__AVX512F__) && defined(__AVX512DQ__)
using Vec = __m512;
#elif defined(__AVX2__)
using Vec = __m256;
#elif defined(__SSE2__)
using Vec = __m128;
#elif defined(__aarch64__)
using Vec = float32x4_t;
#else
using Vec = float;
#endif

constexpr int kVec = sizeof(Vec) / sizeof(float);

ADAZETA_HD Vec load(const float* p) {
  Vec v;
  memcpy(&v, p, sizeof(v));
  return v;
}
ADAZETA_HD void store(float* p, Vec v) { memcpy(p, &v, sizeof(v)); }

#if defined(__SSE2__) || defined(__aarch64__)

typedef int32_t IntVec __attribute__((vector_size(sizeof(Vec))));

struct VecMath {
  using V = Vec;
  static ADAZETA_HD V set(float x) { return x - V{}; }
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  static ADAZETA_HD V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
  static ADAZETA_HD V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
#elif defined(__aarch64__)
  static ADAZETA_HD V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
#else
  static ADAZETA_HD V fma(V a, V b, V c) { return a * b + c; }
#endif
  static ADAZETA_HD V select_less(V a, V b, V c, V d) { return a < b ? c : d; }
  static ADAZETA_HD V abs(V x) { return (V)((IntVec)x & 0x7fffffff); }
  static ADAZETA_HD V with_sign_of(V sign, V magnitude) {
    return (V)(((IntVec)sign & static_cast<int32_t>(0x80000000u)) | (IntVec)magnitude);
  }
  static ADAZETA_HD V shifted_exponent(V k) { return (V)(((IntVec)k + 127) << 23); }
};

#else
using VecMath = ScalarMath;
#endif

// The first n of kVec numbers, zeros behind them; memory beyond is not touched.
ADAZETA_HD Vec load(const float* p, int n) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p);
#else
  float all[kVec] = {};
  memcpy(all, p, n * sizeof(float));
  return load(all);
#endif
}

ADAZETA_HD void store(float* p, Vec v, int n) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), v);
#else
  float all[kVec];
  store(all, v);
  memcpy(p, all, n * sizeof(float));
#endif
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)

ADAZETA_HD Vec load(const BFloat16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
#if defined(__AVX512BF16__)
// Flushes subnormals, so never where bits are promised (tile.h).
ADAZETA_HD void store(BFloat16* p, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  memcpy(p, &rounded, sizeof(rounded));
}
#else
ADAZETA_HD void store(BFloat16* p, Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  __m512i kept = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  kept = _mm512_mask_add_epi32(kept, odd, bits, _mm512_set1_epi32(0x8000));
  kept = _mm512_mask_or_epi32(kept, nan, bits, _mm512_set1_epi32(0x400000));
  // The upper half of every 32 bits, side by side.
  const __m512i upper = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0x1f001d, 0x1b0019, 0x170015, 0x130011, 0xf000d,
                                         0xb0009, 0x70005, 0x30001);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(_mm512_permutexvar_epi16(upper, kept)));
}
#endif
ADAZETA_HD Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
ADAZETA_HD void store(Float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(__AVX2__) && defined(__F16C__)

ADAZETA_HD Vec load(const BFloat16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
ADAZETA_HD void store(BFloat16* p, Vec v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(kept, kept), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
ADAZETA_HD Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
ADAZETA_HD void store(Float16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#else

ADAZETA_HD Vec load(const BFloat16* p) {
  float wide[kVec];
  for (int i = 0; i < kVec; ++i) wide[i] = from_bfloat16(p[i].bits);
  return load(wide);
}
ADAZETA_HD void store(BFloat16* p, Vec v) {
  float wide[kVec];
  store(wide, v);
  for (int i = 0; i < kVec; ++i) p[i].bits = to_bfloat16(wide[i]);
}
ADAZETA_HD Vec load(const Float16* p) {
  float wide[kVec];
  for (int i = 0; i < kVec; ++i) wide[i] = from_float16(p[i].bits);
  return load(wide);
}
ADAZETA_HD void store(Float16* p, Vec v) {
  float wide[kVec];
  store(wide, v);
  for (int i = 0; i < kVec; ++i) p[i].bits = to_float16(wide[i]);
}

#endif

template <class Half>
ADAZETA_HD Vec load(const Half* p, int n) {
  Half all[kVec] = {};
  memcpy(all, p, n * sizeof(Half));
  return load(all);
}
template <class Half>
ADAZETA_HD void store(Half* p, Vec v, int n) {
  Half all[kVec];
  store(all, v);
  memcpy(p, all, n * sizeof(Half));
}

// Sums over the lanes of four vectors, added in the same order whichever of the four a vector is.
ADAZETA_HD void lane_sums(float* out, Vec a, Vec b, Vec c, Vec d) {
#if defined(__SSE2__)
  const auto fold = [](Vec v) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
#else
    return v;
#endif
  };
  const __m128 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const __m128 pq = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
  const __m128 rs = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
  _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(pq, rs), _mm_movehl_ps(rs, pq)));
#else
  const Vec all[4] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) {
    float lanes[kVec];
    store(lanes, all[i]);
    float sum = lanes[0];
    for (int l = 1; l < kVec; ++l) sum += lanes[l];
    out[i] = sum;
  }
#endif
}

}  // namespace
}  // namespace adazeta
