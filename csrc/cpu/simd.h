// The few vector operations that compilers do not find by themselves, for the level this file is compiled for.
//
// Each csrc/cpu/*.cpp that does arithmetic is compiled once per instruction set (CMakeLists.txt). Philox multiplies
// 32 x 32 -> 64 bits, so words live in the low halves of 64-bit lanes, where one instruction gives both product halves;
// the high halves hold rubbish that no later multiplication reads.
#pragma once

#include <cstdint>

#include "adazeta/macros.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define ADAZETA_SIMD_LANES 8
#elif defined(__AVX2__)
#include <immintrin.h>
#define ADAZETA_SIMD_LANES 4
#endif

namespace adazeta {
namespace {

#if ADAZETA_SIMD_LANES == 8

constexpr int kLanes = 8;
using Lanes = __m512i;

ADAZETA_HD Lanes broadcast(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
ADAZETA_HD Lanes load_lanes(const uint64_t* p) { return _mm512_loadu_si512(p); }
ADAZETA_HD Lanes add_lanes(Lanes a, Lanes b) { return _mm512_add_epi64(a, b); }
ADAZETA_HD Lanes multiply_low_halves(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
ADAZETA_HD Lanes high_half(Lanes a) { return _mm512_srli_epi64(a, 32); }
ADAZETA_HD Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// Low halves of a in the even 32-bit places, of b in the odd ones.
ADAZETA_HD void store_merged(uint32_t* p, Lanes a, Lanes b) {
  _mm512_storeu_si512(p, _mm512_mask_blend_epi32(0xaaaa, a, _mm512_slli_epi64(b, 32)));
}
// Words a0 b0 a1 b1 | a4 b4 a5 b5 | ... to p, then a2 b2 a3 b3 | ...: interleaved within each 128 bits.
ADAZETA_HD void store_interleaved(char* p, const char* a, const char* b) {
  const Lanes x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  _mm512_storeu_si512(p, _mm512_unpacklo_epi32(x, y));
  _mm512_storeu_si512(p + 64, _mm512_unpackhi_epi32(x, y));
}

#elif ADAZETA_SIMD_LANES == 4

constexpr int kLanes = 4;
using Lanes = __m256i;

ADAZETA_HD Lanes broadcast(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
ADAZETA_HD Lanes load_lanes(const uint64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
ADAZETA_HD Lanes add_lanes(Lanes a, Lanes b) { return _mm256_add_epi64(a, b); }
ADAZETA_HD Lanes multiply_low_halves(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
ADAZETA_HD Lanes high_half(Lanes a) { return _mm256_srli_epi64(a, 32); }
ADAZETA_HD Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
ADAZETA_HD void store_merged(uint32_t* p, Lanes a, Lanes b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa));
}
ADAZETA_HD void store_interleaved(char* p, const char* a, const char* b) {
  const Lanes x = _mm256_loadu_si256(reinterpret_cast<const Lanes*>(a));
  const Lanes y = _mm256_loadu_si256(reinterpret_cast<const Lanes*>(b));
  _mm256_storeu_si256(reinterpret_cast<Lanes*>(p), _mm256_unpacklo_epi32(x, y));
  _mm256_storeu_si256(reinterpret_cast<Lanes*>(p + 32), _mm256_unpackhi_epi32(x, y));
}

#endif

}  // namespace
}  // namespace adazeta
