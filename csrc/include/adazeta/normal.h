// Two random words to two standard normal numbers, the same bits on every machine.
//
// docs/perturbation-spec.md, section 3, is normative; the coefficients come from scripts/fit_polynomials.py. Only fma,
// multiplication, addition and correctly rounded square root are used, and no product is an operand of a plain sum, so
// that no compiler can fuse or split an operation. Scaling by a power of two is exact, wherever it is done.
//
// Written once over lanes: M supplies the types M::F (float32) and M::U (uint32_t) with their operators, and set, fma,
// square_root, from_integer (of the signed value), bits, from_bits, choose_by_bit_30 and flip_by_bit_31. OneLane below
// is a plain number, for CUDA and for compilers to vectorise; csrc/cpu/simd.h has vectors.
#pragma once

#include <cstdint>

#include "adazeta/fma.h"
#include "adazeta/macros.h"

namespace adazeta {

template <class M>
struct NormalPairOf {
  typename M::F z0, z1;
};

template <class Fma>
struct OneLane {
  using F = float;
  using U = uint32_t;
  static ADAZETA_HD F set(float x) { return x; }
  static ADAZETA_HD F fma(F a, F b, F c) { return Fma::apply(a, b, c); }
  static ADAZETA_HD F square_root(F x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return __builtin_sqrtf(x);
#endif
  }
  static ADAZETA_HD F from_integer(U x) { return static_cast<float>(static_cast<int32_t>(x)); }
  static ADAZETA_HD U bits(F x) { return bit_cast<uint32_t>(x); }
  static ADAZETA_HD F from_bits(U x) { return bit_cast<float>(x); }
  // Bit 30 of v decides.
  static ADAZETA_HD F choose_by_bit_30(U v, F set, F clear) { return (v & 0x40000000u) != 0 ? set : clear; }
  // Bit 31 of v changes the sign of x.
  static ADAZETA_HD F flip_by_bit_31(U v, F x) { return from_bits(bits(x) ^ (v & 0x80000000u)); }
};

// The polynomial by Horner's rule, highest power first.
template <class M, class... Rest>
ADAZETA_HD typename M::F horner(typename M::F x, typename M::F sum, float coefficient, Rest... rest) {
  sum = M::fma(sum, x, M::set(coefficient));
  if constexpr (sizeof...(rest) == 0) {
    return sum;
  } else {
    return horner<M>(x, sum, rest...);
  }
}

// -2 ln(k 2^-24) for k in [1, 2^24].
template <class M>
ADAZETA_HD typename M::F minus_two_log(typename M::U k) {
  // k = m 2^e with m in [sqrt 1/2, sqrt 2): 0x3f3504f3 are the bits of sqrt 1/2, and e stands above 23 bits of zeros.
  const typename M::U bits = M::bits(M::from_integer(k));
  const typename M::U exponent = (bits + (0u - 0x3f3504f3u)) & 0xff800000u;
  const typename M::F a = 1.0f - M::from_bits(bits - exponent);
  const typename M::F q = horner<M>(a, M::set(0x1.65c866p-3f), 0x1.2504c6p-2f, 0x1.31850ep-2f, 0x1.535d2ap-2f,
                                    0x1.98d2c2p-2f, 0x1.00049ap-1f, 0x1.5556f4p-1f, 0x1.fffffap-1f, 0x1.0p+1f);
  // 2 ln 2 per halving, of which there are 24 - e.
  return M::fma(M::from_integer((24u << 23) - exponent), M::set(0x1.62e43p-23f), a * q);
}

// Box-Muller: radius from the first word, angle from the second; 24 bits of each.
template <class M>
ADAZETA_HD NormalPairOf<M> normal_pair_of(typename M::U w0, typename M::U w1) {
  using F = typename M::F;
  const F radius = M::square_root(minus_two_log<M>((w0 >> 8) + 1u));
  // The angle is (quarter + x) quarter turns: x in [-1/2, 1/2) exactly, as the low 22 of 24 bits, sign-extended. The
  // quarter stands in the upper two bits of w1 + 2^29: the lower of them swaps sine and cosine, sine changes sign with
  // the upper, and cosine with the upper of the next quarter.
  const F x = M::from_integer((w1 << 2) & 0xfffffc00u) * 0x1.0p-32f;
  const F y = x * x;
  const F sine = horner<M>(y, M::set(-0x1.2d9302p-8f), 0x1.465e92p-4f, -0x1.4abbbap-1f, 0x1.921fb6p+0f) * x;
  const F cosine = horner<M>(y, M::set(0x1.d9f7bcp-11f), -0x1.55c664p-6f, 0x1.03c1dep-2f, -0x1.3bd3ccp+0f, 1.0f);
  const typename M::U quarter = w1 + 0x20000000u, next = w1 + 0x60000000u;
  return {radius * M::flip_by_bit_31(next, M::choose_by_bit_30(quarter, sine, cosine)),
          radius * M::flip_by_bit_31(quarter, M::choose_by_bit_30(quarter, cosine, sine))};
}

struct NormalPair {
  float z0, z1;
};

template <class Fma>
ADAZETA_HD NormalPair normal_pair(uint32_t w0, uint32_t w1) {
  const NormalPairOf<OneLane<Fma>> pair = normal_pair_of<OneLane<Fma>>(w0, w1);
  return {pair.z0, pair.z1};
}

}  // namespace adazeta
