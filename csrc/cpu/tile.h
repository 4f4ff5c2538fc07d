// A tile: kTile consecutive elements of the index space, held in float32 in the first-level cache.
//
// Tiles start at multiples of kTile of the element *index*, so what is computed for an element depends neither on where
// its tensor starts nor on how tiles are spread over threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "adazeta/dtype.h"
#include "adazeta/params.h"
#include "direction.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace adazeta {
namespace {

constexpr int64_t kTile = 2048;  // one group of Rademacher blocks, 32 groups of Gaussian ones

// Subnormals are kept even where the calling thread flushes them (torch.set_flush_denormal).
class DefaultRounding {
 public:
#if defined(__SSE__)
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// The elements [first, last) of a tile whose element 0 has index `base`.
struct TileRange {
  uint64_t base;
  int first, last;
};

struct Tiling {
  uint64_t offset;
  int64_t numel;

  int64_t count() const {
    if (numel == 0) return 0;
    return static_cast<int64_t>((offset + static_cast<uint64_t>(numel) - 1) / kTile - offset / kTile) + 1;
  }
  TileRange range(int64_t tile) const {
    const uint64_t base = (offset / kTile + static_cast<uint64_t>(tile)) * kTile, end = offset + numel;
    return {base, base < offset ? static_cast<int>(offset - base) : 0,
            end - base < static_cast<uint64_t>(kTile) ? static_cast<int>(end - base) : static_cast<int>(kTile)};
  }
  // Position of the tile's first covered element in the concatenation.
  int64_t position(const TileRange& range) const { return static_cast<int64_t>(range.base + range.first - offset); }
};

// tile <- fma(scale, z(seed), tile) on whole groups of blocks around the range; elements outside it are scratch.
ADAZETA_HD void add_direction(float* __restrict tile, const TileRange& range, uint64_t seed, float scale,
                              Distribution distribution) {
  if (distribution == Distribution::kRademacher) {
    alignas(64) uint32_t words[kGroupWords];
    words_group(seed, range.base / 128, words);
    const uint32_t minus = bit_cast<uint32_t>(scale) ^ 0x80000000u;
    for (int w = range.first / 32; w < (range.last + 31) / 32; ++w) {
      float* acc = tile + 32 * w;
      // z is +-1, so fma(scale, z, acc) is acc +- scale.
      for (int i = 0; i < 32; ++i) acc[i] += bit_cast<float>(minus ^ (((words[w] >> i) & 1u) << 31));
    }
    return;
  }
  for (int g = range.first / kGroupWords; g < (range.last + kGroupWords - 1) / kGroupWords; ++g) {
    alignas(64) float z[kGroupWords];
    float* acc = tile + kGroupWords * g;
    gaussian_group(seed, (range.base >> 2) + g * kGroupBlocks, z);
    for (int i = 0; i < kGroupWords; ++i) acc[i] = LevelFma::apply(scale, z[i], acc[i]);
  }
}

// to[i] <- decay from[i] in float32; exact when decay is 1.
ADAZETA_HD void load(float* __restrict to, const void* from, Dtype dtype, int64_t begin, int n, float decay) {
  if (dtype == Dtype::kFloat32) {
    memcpy(to, static_cast<const float*>(from) + begin, n * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    const uint16_t* half = static_cast<const uint16_t*>(from) + begin;
    for (int i = 0; i < n; ++i) to[i] = from_bfloat16(half[i]);
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(from) + begin;
    for (int i = 0; i < n; ++i) to[i] = from_float16(half[i]);
  }
  if (decay != 1.0f) {
    for (int i = 0; i < n; ++i) to[i] *= decay;
  }
}

// to[i] <- from[i], rounded to nearest even.
ADAZETA_HD void store(void* to, Dtype dtype, int64_t begin, int n, const float* __restrict from) {
  if (dtype == Dtype::kFloat32) {
    memcpy(static_cast<float*>(to) + begin, from, n * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    uint16_t* half = static_cast<uint16_t*>(to) + begin;
    for (int i = 0; i < n; ++i) half[i] = to_bfloat16(from[i]);
  } else {
    uint16_t* half = static_cast<uint16_t*>(to) + begin;
    for (int i = 0; i < n; ++i) half[i] = to_float16(from[i]);
  }
}

}  // namespace
}  // namespace adazeta
