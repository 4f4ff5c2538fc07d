// tt_factors: out[a, p] = the contracted cores of adapter a of theta + scales[p] z(seeds[p]); the perturbed copy of one
// adapter stays in the cache.
#include "adazeta/tt.h"

#include "levels.h"
#include "parallel.h"
#include "tile.h"
#include "vec.h"

namespace adazeta {
namespace ADAZETA_LEVEL {
namespace {

// Rows of c = a b, kRows at a time; kDepth is the inner size, 0 when it is known only at run time.
template <int kRows, int kDepth>
ADAZETA_HD void multiply_rows(float* __restrict c, const float* __restrict a, const float* __restrict b, int depth,
                              int64_t n) {
  const int inner = kDepth == 0 ? depth : kDepth;
  // In registers, where the compiler would load them again for every column.
  Vec known[kRows][kDepth == 0 ? 1 : kDepth];
  for (int r = 0; r < kRows; ++r) {
    for (int k = 0; k < kDepth; ++k) known[r][k] = VecMath::set(a[r * kDepth + k]);
  }
  const auto columns = [&](int64_t i, auto load_b, auto store_c) {
    Vec sum[kRows] = {};
    for (int k = 0; k < inner; ++k) {
      const Vec row = load_b(b + k * n + i);
      for (int r = 0; r < kRows; ++r) {
        sum[r] = VecMath::fma(kDepth == 0 ? VecMath::set(a[r * inner + k]) : known[r][k], row, sum[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) store_c(c + r * n + i, sum[r]);
  };
  int64_t i = 0;
  for (; i + kVec <= n; i += kVec) {
    columns(i, [](const float* p) { return load(p); }, [](float* p, Vec v) { store(p, v); });
  }
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    columns(i, [rest](const float* p) { return load(p, rest); }, [rest](float* p, Vec v) { store(p, v, rest); });
  }
}

template <int kDepth>
void multiply(float* c, const float* a, const float* b, int64_t m, int depth, int64_t n) {
  int64_t row = 0;
  for (; row + 4 <= m; row += 4) multiply_rows<4, kDepth>(c + row * n, a + row * depth, b, depth, n);
  for (; row < m; ++row) multiply_rows<1, kDepth>(c + row * n, a + row * depth, b, depth, n);
}

struct MatrixOps {
  void copy(float* to, const float* from, int64_t n) const { memcpy(to, from, n * sizeof(float)); }
  void multiply(float* c, const float* a, const float* b, int64_t m, int depth, int64_t n) const {
    switch (depth) {
      case 1:
        return ADAZETA_LEVEL::multiply<1>(c, a, b, m, depth, n);
      case 2:
        return ADAZETA_LEVEL::multiply<2>(c, a, b, m, depth, n);
      case 3:
        return ADAZETA_LEVEL::multiply<3>(c, a, b, m, depth, n);
      case 4:
        return ADAZETA_LEVEL::multiply<4>(c, a, b, m, depth, n);
      case 5:
        return ADAZETA_LEVEL::multiply<5>(c, a, b, m, depth, n);
      default:
        return ADAZETA_LEVEL::multiply<0>(c, a, b, m, depth, n);
    }
  }
};

// theta + scale z in `buffer`, whose element 0 has the index of the first tile's; returns where theta[0] lies.
//
// Making normals leaves the memory idle, and writing factors leaves the arithmetic idle: meanwhile the cache lines of
// `out` are fetched, evenly spread over the groups of normals.
float* perturb_copy(const TTFactorsParams& p, const Tiling& tiling, const float* from, int64_t probe, float* buffer,
                    const float* out, int64_t out_numel) {
  constexpr int64_t kMostAhead = 1 << 17;  // numbers; half a MiB stays in the cache until it is written
  const uint64_t base = tiling.range(0).base;
  float* theta = buffer + (tiling.offset - base);
  memcpy(theta, from, tiling.numel * sizeof(float));
  if (p.scales[probe] == 0.0f) return theta;
  const int step = p.distribution == Distribution::kGaussian ? kGroupWords : static_cast<int>(kTile);
  const int64_t ahead = out_numel < kMostAhead ? out_numel : kMostAhead;
  int64_t fetched = 0, done = 0;
  const int64_t tiles = tiling.count();
  for (int64_t i = 0; i < tiles; ++i) {
    const TileRange tile = tiling.range(i);
    for (int first = tile.first, last; first < tile.last; first = last) {
      last = (first / step + 1) * step;
      if (last > tile.last) last = tile.last;
      add_direction(buffer + (tile.base - base), {tile.base, first, last}, p.seeds[probe], p.scales[probe],
                    p.distribution);
      done += last - first;
      for (; fetched < ahead * done / tiling.numel; fetched += 16) __builtin_prefetch(out + fetched, 1);
    }
  }
  return theta;
}

}  // namespace

void tt_factors(const TTFactorsParams& p) {
  const int64_t numel = theta_numel(p.layout), factors = factor_numel(p.layout);
  const int64_t copy_numel = (numel / kTile + 2) * kTile;  // as many tiles as an adapter can touch
  const FactorsScratch products = factors_scratch(p.layout);
  const Scratch scratch(p.threads, copy_numel + products.halves * products.half);
  for_ranges(p.threads, p.adapters * p.probes, [&](int thread, int64_t first, int64_t last) {
    const DefaultRounding rounding;
    float* buffer = scratch.of(thread);
    memset(buffer, 0, copy_numel * sizeof(float));
    for (int64_t item = first; item < last; ++item) {
      const int64_t begin = item / p.probes * numel;
      const Tiling tiling{p.offset + static_cast<uint64_t>(begin), numel};
      float* out = p.out + item * factors;
      const float* theta = perturb_copy(p, tiling, p.theta + begin, item % p.probes, buffer, out, factors);
      contract_adapter(p.layout, theta, buffer + copy_numel, out, MatrixOps{});
    }
  });
}

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
