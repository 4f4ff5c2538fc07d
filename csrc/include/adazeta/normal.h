// Two random words to two standard normal numbers, the same bits on every machine.
//
// docs/perturbation-spec.md, section 3, is normative; the coefficients come from scripts/fit_polynomials.py. Only fma,
// multiplication, addition and correctly rounded square root are used, and no product is an operand of a plain sum, so
// that no compiler can fuse or split an operation.
#pragma once

#include <cstdint>

#include "adazeta/fma.h"
#include "adazeta/macros.h"

namespace adazeta {

struct NormalPair {
  float z0, z1;
};

ADAZETA_HD float sqrt_rn(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

// -2 ln(k 2^-24) for k in [1, 2^24].
template <class Fma>
ADAZETA_HD float minus_two_log(uint32_t k) {
  // k = m 2^e with m in [sqrt 1/2, sqrt 2): 0x3f3504f3 are the bits of sqrt 1/2.
  const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(k)));
  const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float a = 1.0f - bit_cast<float>(bits - (static_cast<uint32_t>(e) << 23));
  float q = 0x1.65c866p-3f;
  q = Fma::apply(q, a, 0x1.2504c6p-2f);
  q = Fma::apply(q, a, 0x1.31850ep-2f);
  q = Fma::apply(q, a, 0x1.535d2ap-2f);
  q = Fma::apply(q, a, 0x1.98d2c2p-2f);
  q = Fma::apply(q, a, 0x1.00049ap-1f);
  q = Fma::apply(q, a, 0x1.5556f4p-1f);
  q = Fma::apply(q, a, 0x1.fffffap-1f);
  q = Fma::apply(q, a, 0x1.0p+1f);
  return Fma::apply(static_cast<float>(24 - e), 0x1.62e43p+0f, a * q);  // 2 ln 2 per halving
}

// Box-Muller: radius from the first word, angle from the second; 24 bits of each.
template <class Fma>
ADAZETA_HD NormalPair normal_pair(uint32_t w0, uint32_t w1) {
  const float radius = sqrt_rn(minus_two_log<Fma>((w0 >> 8) + 1u));
  // The angle is (quarter + x) quarter turns: x in [-1/2, 1/2) exactly, as the low 22 of 24 bits, sign-extended.
  const uint32_t quarter = (w1 + 0x20000000u) >> 30;
  const float x = static_cast<float>(static_cast<int32_t>((w1 >> 8) << 10)) * 0x1.0p-32f;
  const float y = x * x;
  float s = -0x1.2d9302p-8f;
  s = Fma::apply(s, y, 0x1.465e92p-4f);
  s = Fma::apply(s, y, -0x1.4abbbap-1f);
  s = Fma::apply(s, y, 0x1.921fb6p+0f);
  const float sine = s * x;
  float c = 0x1.d9f7bcp-11f;
  c = Fma::apply(c, y, -0x1.55c664p-6f);
  c = Fma::apply(c, y, 0x1.03c1dep-2f);
  c = Fma::apply(c, y, -0x1.3bd3ccp+0f);
  const float cosine = Fma::apply(c, y, 1.0f);
  const bool odd = (quarter & 1u) != 0;
  const uint32_t flip0 = ((quarter + 1u) & 2u) << 30;
  const uint32_t flip1 = (quarter & 2u) << 30;
  return {radius * bit_cast<float>(bit_cast<uint32_t>(odd ? sine : cosine) ^ flip0),
          radius * bit_cast<float>(bit_cast<uint32_t>(odd ? cosine : sine) ^ flip1)};
}

}  // namespace adazeta
