// Activations of the adapter, written once over a vector or scalar type: fma, products, one division, no library call.
//
// M supplies the type M::V and, for it, set, fma (which may round the product), select_less(a, b, c, d) = a < b ? c :
// d, abs, with_sign_of and shifted_exponent. The polynomials come from scripts/fit_activations.py. NaN stays NaN;
// of inf and -inf gelu and silu are inf and NaN, as in torch's float64.
// Errors against exact values, in units of float32 rounding 2^-24 (tests/kernels/test_native_tt.py):
//   tanh, relative: 4;   silu, relative to |x|: 3;   gelu, relative to |x|: 2, and to the value: 6 for x >= -1.
#pragma once

#include <cstdint>

#include "adazeta/fma.h"
#include "adazeta/macros.h"
#include "adazeta/params.h"

namespace adazeta {

struct ScalarMath {
  using V = float;
  static ADAZETA_HD V set(float x) { return x; }
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  static ADAZETA_HD V fma(V a, V b, V c) { return HardwareFma::apply(a, b, c); }
#else
  static ADAZETA_HD V fma(V a, V b, V c) { return a * b + c; }
#endif
  static ADAZETA_HD V select_less(V a, V b, V c, V d) { return a < b ? c : d; }
  static ADAZETA_HD V abs(V x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0x7fffffffu); }
  static ADAZETA_HD V with_sign_of(V sign, V magnitude) {
    return bit_cast<float>((bit_cast<uint32_t>(sign) & 0x80000000u) | bit_cast<uint32_t>(magnitude));
  }
  static ADAZETA_HD V shifted_exponent(V k) { return bit_cast<float>((bit_cast<uint32_t>(k) + 127u) << 23); }
};

template <class M>
struct Exponential {
  typename M::V power, rest;  // exp(y) = power (1 + rest)
};

// For y <= 0; below -87, where exp(y) < 2^-125, the value at -87.
template <class M>
ADAZETA_HD Exponential<M> exponential(typename M::V y) {
  using V = typename M::V;
  y = M::select_less(y, M::set(-87.0f), M::set(-87.0f), y);
  // Adding 3 2^22 rounds to an integer and leaves it in the low bits, from where shifted_exponent makes 2^n.
  const V shift = M::set(0x1.8p+23f);
  const V k = M::fma(y, M::set(0x1.715476p+0f), shift);
  const V n = k - shift;
  // ln 2 in two parts; n times the first is exact, with and without a fused product.
  V f = M::fma(n, M::set(-0x1.62e4p-1f), y);
  f = M::fma(n, M::set(-0x1.7f7d1cp-20f), f);
  V e = M::set(0x1.6a2438p-10f);
  e = M::fma(e, f, M::set(0x1.1239ep-7f));
  e = M::fma(e, f, M::set(0x1.5558f2p-5f));
  e = M::fma(e, f, M::set(0x1.555492p-3f));
  e = M::fma(e, f, M::set(0x1.fffffcp-2f));
  return {M::shifted_exponent(k), M::fma(f * f, e, f)};
}

// y, the activation of x, but inf for inf, and NaN for -inf and NaN; t = |x|.
template <class M>
ADAZETA_HD typename M::V unless_infinite(typename M::V x, typename M::V t, typename M::V y) {
  const typename M::V infinity = M::set(__builtin_inff());
  return M::select_less(t, infinity, y, x + infinity);
}

// x Phi(x), exact form, by Phi(-t) = exp(-t P(t)) / 2.
template <class M>
ADAZETA_HD typename M::V gelu(typename M::V x) {
  using V = typename M::V;
  const V t = M::abs(x);
  V p = M::set(0x1.0dcbbap-26f);
  p = M::fma(p, t, M::set(-0x1.0add88p-21f));
  p = M::fma(p, t, M::set(0x1.bff7e2p-18f));
  p = M::fma(p, t, M::set(-0x1.954b7ap-15f));
  p = M::fma(p, t, M::set(0x1.797a2ep-13f));
  p = M::fma(p, t, M::set(0x1.9ecebcp-16f));
  p = M::fma(p, t, M::set(-0x1.3d4a3ep-8f));
  p = M::fma(p, t, M::set(0x1.29e718p-5f));
  p = M::fma(p, t, M::set(0x1.45f142p-2f));
  p = M::fma(p, t, M::set(0x1.988464p-1f));
  const Exponential<M> e = exponential<M>(M::set(0.0f) - p * t);
  const V half = e.power * M::set(0.5f);
  const V tail = x * M::fma(half, e.rest, half);
  return unless_infinite<M>(x, t, M::select_less(x, M::set(0.0f), tail, x - tail));
}

// x / (1 + exp(-x)).
template <class M>
ADAZETA_HD typename M::V silu(typename M::V x) {
  using V = typename M::V;
  const V t = M::abs(x);
  const Exponential<M> parts = exponential<M>(M::set(0.0f) - t);
  const V e = M::fma(parts.power, parts.rest, parts.power);
  return unless_infinite<M>(x, t, M::select_less(x, M::set(0.0f), x * e, x) / (M::set(1.0f) + e));
}

// By m = exp(-2 |x|) - 1, which keeps its relative accuracy near 0.
template <class M>
ADAZETA_HD typename M::V tanh(typename M::V x) {
  using V = typename M::V;
  const Exponential<M> e = exponential<M>(M::set(-2.0f) * M::abs(x));
  const V m = M::fma(e.power, e.rest, e.power - M::set(1.0f));
  return M::with_sign_of(x, M::abs(m / (M::set(2.0f) + m)));
}

template <class M, Act kAct>
ADAZETA_HD typename M::V activation(typename M::V x) {
  if constexpr (kAct == Act::kRelu) return M::select_less(x, M::set(0.0f), M::set(0.0f), x);
  if constexpr (kAct == Act::kGelu) return gelu<M>(x);
  if constexpr (kAct == Act::kSilu) return silu<M>(x);
  if constexpr (kAct == Act::kTanh) return tanh<M>(x);
  return x;
}

}  // namespace adazeta
