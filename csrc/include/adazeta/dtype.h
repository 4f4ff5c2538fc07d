// bfloat16 and float16 to and from float32, as integer arithmetic (float16 on a GPU: its conversion, the same
// but for the payload of a NaN): round to nearest even, subnormals, infinities, NaN.
#pragma once

#include <cstdint>

#include "adazeta/fma.h"
#include "adazeta/macros.h"

namespace adazeta {

ADAZETA_HD float from_bfloat16(uint16_t h) { return bit_cast<float>(static_cast<uint32_t>(h) << 16); }

ADAZETA_HD uint16_t to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;  // rounding could carry a NaN into an infinity
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

ADAZETA_HD float from_float16(uint16_t h) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
  return x;
#else
  const uint32_t magnitude = h & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1.0p-24f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t bits = magnitude < 0x0400u ? subnormal : magnitude < 0x7c00u ? normal : special;
  return bit_cast<float>(bits | (static_cast<uint32_t>(h & 0x8000u) << 16));
#endif
}

ADAZETA_HD uint16_t to_float16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return h;
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the unit is 2^-24, which is the unit in the last place of 1/2: the addition does the rounding.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude < 0x38800000u ? magnitude : 0u) + 0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = magnitude < 0x38800000u ? subnormal - 0x3f000000u : magnitude < 0x47800000u ? normal : special;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
#endif
}

}  // namespace adazeta
