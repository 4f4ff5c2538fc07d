// Stretches of a direction, 16 blocks at a time, so that loops over lanes vectorise.
#pragma once

#include <cstdint>

#include "adazeta/normal.h"
#include "adazeta/philox.h"
#include "simd.h"

namespace adazeta {
namespace {

#if defined(__FMA__) || defined(__aarch64__)
using LevelFma = HardwareFma;
#else
using LevelFma = SoftwareFma;
#endif

constexpr int kGroupBlocks = 16;               // blocks generated together
constexpr int kGroupWords = 4 * kGroupBlocks;  // a word is a Gaussian element, or 32 Rademacher ones

#if defined(ADAZETA_SIMD_LANES)

// Words of kLanes blocks: 0 and 2 of each block to `even`, 1 and 3 to `odd`. Lane 2j holds block j and lane 2j + 1
// block j + kLanes / 2: the order that store_interleaved turns into element order.
ADAZETA_HD void philox_lanes(uint64_t seed, uint64_t first_block, uint32_t* even, uint32_t* odd) {
  static constexpr uint64_t kOrder8[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  static constexpr uint64_t kOrder4[4] = {0, 2, 1, 3};
  const Lanes m0 = broadcast(kPhiloxM0), m1 = broadcast(kPhiloxM1);
  // first_block is a multiple of kLanes, so adding a lane number never carries into the high word.
  Lanes c0 = add_lanes(broadcast(first_block & 0xffffffffu), load_lanes(kLanes == 8 ? kOrder8 : kOrder4));
  Lanes c1 = broadcast(first_block >> 32), c2 = broadcast(kStreamDirection), c3 = broadcast(0);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Lanes p0 = multiply_low_halves(m0, c0), p1 = multiply_low_halves(m1, c2);
    c0 = xor3(high_half(p1), c1, broadcast(k0));
    c2 = xor3(high_half(p0), c3, broadcast(k1));
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  store_merged(even, c0, c2);
  store_merged(odd, c1, c3);
}

ADAZETA_HD void philox_even_odd(uint64_t seed, uint64_t first_block, uint32_t* even, uint32_t* odd) {
  for (int i = 0; i < kGroupBlocks; i += kLanes) philox_lanes(seed, first_block + i, even + 2 * i, odd + 2 * i);
}

ADAZETA_HD void interleave(void* out, const void* even, const void* odd) {
  char* to = static_cast<char*>(out);
  const char *a = static_cast<const char*>(even), *b = static_cast<const char*>(odd);
  for (int i = 0; i < kGroupWords / 2; i += 2 * kLanes) store_interleaved(to + 8 * i, a + 4 * i, b + 4 * i);
}

#else

ADAZETA_HD void philox_even_odd(uint64_t seed, uint64_t first_block, uint32_t* even, uint32_t* odd) {
  for (int i = 0; i < kGroupBlocks; ++i) {
    const Words w = philox(seed, first_block + i);
    even[2 * i] = w.w0;
    odd[2 * i] = w.w1;
    even[2 * i + 1] = w.w2;
    odd[2 * i + 1] = w.w3;
  }
}

ADAZETA_HD void interleave(void* out, const void* even, const void* odd) {
  char* to = static_cast<char*>(out);
  const char *a = static_cast<const char*>(even), *b = static_cast<const char*>(odd);
  for (int i = 0; i < kGroupWords / 2; ++i) {
    memcpy(to + 8 * i, a + 4 * i, 4);
    memcpy(to + 8 * i + 4, b + 4 * i, 4);
  }
}

#endif

// The words of kGroupBlocks blocks in order; first_block is a multiple of kGroupBlocks.
ADAZETA_HD void words_group(uint64_t seed, uint64_t first_block, uint32_t* __restrict words) {
  alignas(64) uint32_t even[kGroupWords / 2], odd[kGroupWords / 2];
  philox_even_odd(seed, first_block, even, odd);
  interleave(words, even, odd);
}

// The Gaussian elements of kGroupBlocks blocks.
ADAZETA_HD void gaussian_group(uint64_t seed, uint64_t first_block, float* __restrict z) {
  constexpr int n = kGroupWords / 2;
  alignas(64) uint32_t even[n], odd[n];
  alignas(64) float z0[n], z1[n];
  philox_even_odd(seed, first_block, even, odd);
  for (int i = 0; i < n; ++i) {
    const NormalPair pair = normal_pair<LevelFma>(even[i], odd[i]);
    z0[i] = pair.z0;
    z1[i] = pair.z1;
  }
  interleave(z, z0, z1);
}

}  // namespace
}  // namespace adazeta
