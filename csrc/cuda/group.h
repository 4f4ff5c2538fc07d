// A group: 8 consecutive elements of the index space, held in the registers of one thread. Groups start at multiples of
// 8 of the element index, so that a group is two Gaussian blocks, or one byte of a Rademacher block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "adazeta/dtype.h"
#include "adazeta/normal.h"
#include "adazeta/params.h"
#include "adazeta/philox.h"
#include "adazeta/rademacher.h"

namespace adazeta {

constexpr int kGroup = 8;

// Groups that cover numel elements from index `offset` on.
inline int64_t group_count(uint64_t offset, int64_t numel) {
  if (numel == 0) return 0;
  return static_cast<int64_t>((offset + static_cast<uint64_t>(numel) - 1) / kGroup - offset / kGroup) + 1;
}

// z <- the direction's elements base .. base + 7.
template <Distribution kDistribution>
ADAZETA_HD void direction_group(uint64_t seed, uint64_t base, float (&z)[kGroup]) {
  if constexpr (kDistribution == Distribution::kRademacher) {
    const Words words = philox(seed, base / 128);
    const bool upper = (base & 64) != 0;
    const uint32_t low = upper ? words.w2 : words.w0, high = upper ? words.w3 : words.w1;
    const uint32_t byte = ((base & 32) != 0 ? high : low) >> (base & 24);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) z[i] = sign_of_bit(byte, i);
  } else {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const Words words = philox(seed, base / 4 + b);
      const NormalPair first = normal_pair<HardwareFma>(words.w0, words.w1);
      const NormalPair second = normal_pair<HardwareFma>(words.w2, words.w3);
      z[4 * b] = first.z0;
      z[4 * b + 1] = first.z1;
      z[4 * b + 2] = second.z0;
      z[4 * b + 3] = second.z1;
    }
  }
}

// acc <- fma(scale, z, acc); a zero scale adds nothing, not even the sign of a zero.
template <Distribution kDistribution>
ADAZETA_HD void add_direction_group(uint64_t seed, float scale, uint64_t base, float (&acc)[kGroup]) {
  if (scale == 0.0f) return;
  float z[kGroup];
  direction_group<kDistribution>(seed, base, z);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) acc[i] = HardwareFma::apply(scale, z[i], acc[i]);
}

ADAZETA_HD int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

ADAZETA_HD bool aligned_16(const void* data, Dtype dtype, int64_t at) {
  return (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(at * element_bytes(dtype))) % 16 == 0;
}

ADAZETA_HD float widen(Dtype dtype, uint16_t half) {
  return dtype == Dtype::kBFloat16 ? from_bfloat16(half) : from_float16(half);
}
ADAZETA_HD uint16_t narrow(Dtype dtype, float value) {
  return dtype == Dtype::kBFloat16 ? to_bfloat16(value) : to_float16(value);
}

ADAZETA_HD float load_element(const void* data, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(data)[at];
  return widen(dtype, static_cast<const uint16_t*>(data)[at]);
}
ADAZETA_HD void store_element(void* data, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(data)[at] = value;
  } else {
    static_cast<uint16_t*>(data)[at] = narrow(dtype, value);
  }
}

// Eight elements from two vectors of 16 bytes (float32) or one.
template <Dtype kDtype>
ADAZETA_HD void widen_group(const uint4* bits, float (&to)[kGroup]) {
  if constexpr (kDtype == Dtype::kFloat32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      to[4 * i] = bit_cast<float>(bits[i].x), to[4 * i + 1] = bit_cast<float>(bits[i].y);
      to[4 * i + 2] = bit_cast<float>(bits[i].z), to[4 * i + 3] = bit_cast<float>(bits[i].w);
    }
  } else {
    const uint32_t words[4] = {bits->x, bits->y, bits->z, bits->w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = widen(kDtype, static_cast<uint16_t>(words[i] & 0xffffu));
      to[2 * i + 1] = widen(kDtype, static_cast<uint16_t>(words[i] >> 16));
    }
  }
}

// And back, rounded to nearest even.
template <Dtype kDtype>
ADAZETA_HD void narrow_group(const float (&from)[kGroup], uint4* bits) {
  if constexpr (kDtype == Dtype::kFloat32) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      bits[i] = uint4{bit_cast<uint32_t>(from[4 * i]), bit_cast<uint32_t>(from[4 * i + 1]),
                      bit_cast<uint32_t>(from[4 * i + 2]), bit_cast<uint32_t>(from[4 * i + 3])};
    }
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = narrow(kDtype, from[2 * i]) | static_cast<uint32_t>(narrow(kDtype, from[2 * i + 1])) << 16;
    }
    *bits = uint4{words[0], words[1], words[2], words[3]};
  }
}

// One store of 16 bytes, to device or shared memory. nvcc takes a plain one apart where it cannot tell it from the
// reads around it.
ADAZETA_HD void store_16(void* to, uint4 bits) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = bits;
#endif
}

// Eight elements in accesses of 16 bytes; data + at is aligned to 16 bytes.
ADAZETA_HD void load_group(const void* data, Dtype dtype, int64_t at, float (&to)[kGroup]) {
  if (dtype == Dtype::kFloat32) {
    const uint4* from = reinterpret_cast<const uint4*>(static_cast<const float*>(data) + at);
    const uint4 bits[2] = {from[0], from[1]};
    widen_group<Dtype::kFloat32>(bits, to);
  } else {
    const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + at);
    if (dtype == Dtype::kBFloat16) {
      widen_group<Dtype::kBFloat16>(&bits, to);
    } else {
      widen_group<Dtype::kFloat16>(&bits, to);
    }
  }
}
ADAZETA_HD void store_group(void* data, Dtype dtype, int64_t at, const float (&from)[kGroup]) {
  if (dtype == Dtype::kFloat32) {
    uint4* to = reinterpret_cast<uint4*>(static_cast<float*>(data) + at);
    uint4 bits[2];
    narrow_group<Dtype::kFloat32>(from, bits);
    store_16(to, bits[0]);
    store_16(to + 1, bits[1]);
  } else {
    uint4 bits;
    if (dtype == Dtype::kBFloat16) {
      narrow_group<Dtype::kBFloat16>(from, &bits);
    } else {
      narrow_group<Dtype::kFloat16>(from, &bits);
    }
    store_16(static_cast<uint16_t*>(data) + at, bits);
  }
}

// The eight elements at `at`, of which those outside [0, numel) are neither read nor written.
ADAZETA_HD void load_group_within(const void* data, Dtype dtype, int64_t at, int64_t numel, float (&to)[kGroup]) {
  if (at >= 0 && at + kGroup <= numel && aligned_16(data, dtype, at)) return load_group(data, dtype, at, to);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) to[i] = at + i >= 0 && at + i < numel ? load_element(data, dtype, at + i) : 0.0f;
}
ADAZETA_HD void store_group_within(void* data, Dtype dtype, int64_t at, int64_t numel, const float (&from)[kGroup]) {
  if (at >= 0 && at + kGroup <= numel && aligned_16(data, dtype, at)) return store_group(data, dtype, at, from);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if (at + i >= 0 && at + i < numel) store_element(data, dtype, at + i, from[i]);
  }
}

}  // namespace adazeta
