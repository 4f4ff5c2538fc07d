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
#include "vec.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif
#if defined(__AVX512BF16__)
#error "conversion to bfloat16 flushes subnormals with these flags"
#endif

namespace adazeta {
namespace {

constexpr int64_t kTile = 4096;  // at least one group of Rademacher blocks, and a few of Gaussian ones
static_assert(kTile % (32 * kGroupWords) == 0, "a tile is a whole number of groups");

// Rounds to nearest and keeps subnormals, even where the calling thread flushes them (torch.set_flush_denormal).
class DefaultRounding {
#if defined(__SSE__)
 public:
  DefaultRounding() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultRounding() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
 public:
  DefaultRounding() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    set(0);
  }
  ~DefaultRounding() { set(saved_); }

 private:
  // The clobber holds loads and stores, and with them the arithmetic between, on their side of the switch.
  static void set(uint64_t control) { __asm__ volatile("msr fpcr, %0" : : "r"(control) : "memory"); }
  uint64_t saved_;
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

// tile[i] <- tile[i] + scale, or - scale where bit i of the word is clear, for 32 elements.
ADAZETA_HD void add_signs(float* __restrict tile, uint32_t word, float scale) {
#if ADAZETA_SIMD_BYTES == 64
  const __m512 plus = _mm512_set1_ps(scale), minus = _mm512_set1_ps(-scale);
  const __m512 low = _mm512_mask_blend_ps(static_cast<__mmask16>(word), minus, plus);
  const __m512 high = _mm512_mask_blend_ps(static_cast<__mmask16>(word >> 16), minus, plus);
  store(tile, _mm512_add_ps(load(tile), low));
  store(tile + 16, _mm512_add_ps(load(tile + 16), high));
#else
  const uint32_t minus = bit_cast<uint32_t>(scale) ^ 0x80000000u;
  for (int i = 0; i < 32; ++i) tile[i] += bit_cast<float>(minus ^ (((word >> i) & 1u) << 31));
#endif
}

// tile <- fma(scale, z(seed), tile) on whole groups of blocks around the range; elements outside it are scratch.
ADAZETA_HD void add_direction(float* __restrict tile, const TileRange& range, uint64_t seed, float scale,
                              Distribution distribution) {
  if (distribution == Distribution::kRademacher) {
    // z is +-1, so fma(scale, z, acc) is acc +- scale.
    constexpr int kGroupSigns = 32 * kGroupWords;
    for (int g = range.first / kGroupSigns; g * kGroupSigns < range.last; ++g) {
      alignas(64) uint32_t words[kGroupWords];
      words_group(seed, range.base / 128 + g * kGroupBlocks,
                  [&](int place, WordRegister w) { memcpy(words + place, &w, sizeof(w)); });
      float* acc = tile + g * kGroupSigns;
      const int end = range.last - g * kGroupSigns;
      for (int w = 0; w < kGroupWords && 32 * w < end; ++w) add_signs(acc + 32 * w, words[w], scale);
    }
    return;
  }
  for (int g = range.first / kGroupWords; g * kGroupWords < range.last; ++g) {
    float* acc = tile + g * kGroupWords;
    gaussian_group(seed, range.base / 4 + g * kGroupBlocks, [&](int place, FloatRegister z) {
#if defined(ADAZETA_SIMD_BYTES)
      store(acc + place, fma(scale - FloatRegister{}, z, load(acc + place)));
#else
      acc[place] = LevelFma::apply(scale, z, acc[place]);
#endif
    });
  }
}

template <class Half>
ADAZETA_HD void widen(float* __restrict to, const Half* from, int n) {
  int i = 0;
  for (; i + kVec <= n; i += kVec) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}

template <class Half>
ADAZETA_HD void narrow(Half* to, const float* __restrict from, int n) {
  int i = 0;
  for (; i + kVec <= n; i += kVec) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}

// to[i] <- decay from[i] in float32; exact when decay is 1.
ADAZETA_HD void load(float* __restrict to, const void* from, Dtype dtype, int64_t begin, int n, float decay) {
  if (dtype == Dtype::kFloat32) {
    memcpy(to, static_cast<const float*>(from) + begin, n * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    widen(to, static_cast<const BFloat16*>(from) + begin, n);
  } else {
    widen(to, static_cast<const Float16*>(from) + begin, n);
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
    narrow(static_cast<BFloat16*>(to) + begin, from, n);
  } else {
    narrow(static_cast<Float16*>(to) + begin, from, n);
  }
}

}  // namespace
}  // namespace adazeta
