// float32 fused multiply-add, rounded once, on hardware with and without the instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "adazeta/macros.h"

namespace adazeta {

template <class To, class From>
ADAZETA_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

struct HardwareFma {
  static ADAZETA_HD float apply(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
  }
};

// The product is exact in double. Its sum with c is rounded to odd (the last bit of an inexact sum is set), after which
// rounding to float gives the same as rounding the exact sum (Boldo and Melquiond, 2008). Inlines and vectorises, where
// a call to the C library's fmaf would not.
struct SoftwareFma {
  static ADAZETA_HD float apply(float a, float b, float c) {
    const double product = static_cast<double>(a) * static_cast<double>(b);
    const double addend = static_cast<double>(c);
    const double sum = product + addend;
    // Knuth's two-sum: sum + error is exactly product + addend. For infinities and NaN error is NaN, and sum is kept.
    const double part = sum - product;
    const double error = (product - (sum - part)) + (addend - part);
    const uint64_t bits = bit_cast<uint64_t>(sum);
    // An even inexact sum steps to its odd neighbour on the side of the exact one: up in magnitude when error and sum
    // have the same sign. Masks rather than branches, so that the loop around this vectorises.
    const uint64_t inexact_even = ((error < 0.0) | (error > 0.0)) ? ~bits & 1u : 0u;
    const uint64_t down = (bit_cast<uint64_t>(error) ^ bits) >> 63;
    const uint64_t odd = bits + (inexact_even ^ (uint64_t{0} - down)) + down;
    return static_cast<float>(bit_cast<double>(odd));
  }
};

}  // namespace adazeta
