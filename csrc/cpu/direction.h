// Stretches of a direction: a group is kGroupBlocks Philox blocks, made together.
#pragma once

#include <cstdint>
#include <cstring>

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

#if defined(ADAZETA_SIMD_BYTES)

constexpr int kGroupBlocks = kWide * kBlocks;

// Words 0 and 2 of each block, in order, to `even`, words 1 and 3 to `odd`: lane i is the pair that makes the Gaussian
// elements 2i and 2i + 1. first_block is a multiple of kGroupBlocks.
ADAZETA_HD void philox_group(uint64_t seed, uint64_t first_block, WideWords& even, WideWords& odd) {
  static_assert(kStreamDirection == 0, "the first two rounds count on zeros in half of the counter");
  constexpr uint64_t kCount[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  PairRegister count, c0[kWide], c1[kWide], c2[kWide], c3[kWide];
  memcpy(&count, kCount, sizeof(count));
  const PairRegister m0 = broadcast(kPhiloxM0), m1 = broadcast(kPhiloxM1);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const auto next_key = [&] {
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  };
  // Round 1: with c2 = c3 = 0 the second product is 0, and c0 becomes the same in all lanes. No block number carries
  // into its upper word, as first_block is a multiple.
  for (int i = 0; i < kWide; ++i) {
    const PairRegister block = broadcast((first_block & 0xffffffffu) + static_cast<uint64_t>(i * kBlocks)) + count;
    c3[i] = multiply_low_halves(m0, block);
    c2[i] = high_half(c3[i]) ^ broadcast(k1);
  }
  const uint64_t product = static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(first_block >> 32) ^ k0);
  // Round 2: the first product is the same in all lanes.
  next_key();
  for (int i = 0; i < kWide; ++i) {
    c1[i] = multiply_low_halves(m1, c2[i]);
    c0[i] = high_half(c1[i]) ^ broadcast(k0);
    c2[i] = c3[i] ^ broadcast((product >> 32) ^ k1);
  }
  // Round 3: c3 is the same in all lanes.
  next_key();
  for (int i = 0; i < kWide; ++i) {
    c3[i] = multiply_low_halves(m0, c0[i]);
    const PairRegister p1 = multiply_low_halves(m1, c2[i]);
    c0[i] = xor3(high_half(p1), c1[i], broadcast(k0));
    c2[i] = high_half(c3[i]) ^ broadcast(static_cast<uint32_t>(product) ^ k1);
    c1[i] = p1;
  }
#pragma GCC unroll 6
  for (int round = 4; round < 10; ++round) {
    next_key();
    for (int i = 0; i < kWide; ++i) {
      const PairRegister p0 = multiply_low_halves(m0, c0[i]), p1 = multiply_low_halves(m1, c2[i]);
      c0[i] = xor3(high_half(p1), c1[i], broadcast(k0));
      c2[i] = xor3(high_half(p0), c3[i], broadcast(k1));
      c1[i] = p1;
      c3[i] = p0;
    }
  }
  // Round 10 on merged halves.
  next_key();
  const PairRegister key = broadcast(k0 | static_cast<uint64_t>(k1) << 32);
  for (int i = 0; i < kWide; ++i) {
    const PairRegister p0 = multiply_low_halves(m0, c0[i]), p1 = multiply_low_halves(m1, c2[i]);
    even.r[i] = (WordRegister)xor3(merge_high(p1, p0), merge_low(c1[i], c3[i]), key);
    odd.r[i] = (WordRegister)merge_low(p1, p0);
  }
}

// Calls emit(place, register) with the group's words, or Gaussian elements, kLanes at a time in order.
template <class Emit>
ADAZETA_HD void words_group(uint64_t seed, uint64_t first_block, Emit emit) {
  WideWords even, odd;
  philox_group(seed, first_block, even, odd);
  for (int i = 0; i < kWide; ++i) {
    WordRegister low, high;
    interleave(even.r[i], odd.r[i], &low, &high);
    emit(2 * i * kLanes, low);
    emit((2 * i + 1) * kLanes, high);
  }
}

template <class Emit>
ADAZETA_HD void gaussian_group(uint64_t seed, uint64_t first_block, Emit emit) {
  WideWords even, odd;
  philox_group(seed, first_block, even, odd);
  const NormalPairOf<WideLanes> pair = normal_pair_of<WideLanes>(even, odd);
  for (int i = 0; i < kWide; ++i) {
    FloatRegister low, high;
    interleave(pair.z0.r[i], pair.z1.r[i], &low, &high);
    emit(2 * i * kLanes, low);
    emit((2 * i + 1) * kLanes, high);
  }
}

#else

// Loops over blocks and pairs, for the compiler to vectorise.
constexpr int kGroupBlocks = 16;
using WordRegister = uint32_t;
using FloatRegister = float;

template <class Emit>
ADAZETA_HD void words_group(uint64_t seed, uint64_t first_block, Emit emit) {
  for (int i = 0; i < kGroupBlocks; ++i) {
    const Words words = philox(seed, first_block + i);
    emit(4 * i, words.w0);
    emit(4 * i + 1, words.w1);
    emit(4 * i + 2, words.w2);
    emit(4 * i + 3, words.w3);
  }
}

template <class Emit>
ADAZETA_HD void gaussian_group(uint64_t seed, uint64_t first_block, Emit emit) {
  constexpr int n = 2 * kGroupBlocks;
  alignas(64) uint32_t even[n], odd[n];
  alignas(64) float z0[n], z1[n];
  for (int i = 0; i < kGroupBlocks; ++i) {
    const Words words = philox(seed, first_block + i);
    even[2 * i] = words.w0;
    odd[2 * i] = words.w1;
    even[2 * i + 1] = words.w2;
    odd[2 * i + 1] = words.w3;
  }
  for (int i = 0; i < n; ++i) {
    const NormalPair pair = normal_pair<LevelFma>(even[i], odd[i]);
    z0[i] = pair.z0;
    z1[i] = pair.z1;
  }
  for (int i = 0; i < n; ++i) {
    emit(2 * i, z0[i]);
    emit(2 * i + 1, z1[i]);
  }
}

#endif

constexpr int kGroupWords = 4 * kGroupBlocks;  // a word is a Gaussian element, or 32 Rademacher ones

}  // namespace
}  // namespace adazeta
