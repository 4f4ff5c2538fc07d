// tt_factors: out[p] = the contracted cores of theta + scales[p] z(seeds[p]); the perturbed copy stays in the cache.
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
  const auto columns = [&](int64_t i, auto load_b, auto store_c) {
    Vec sum[kRows] = {};
    for (int k = 0; k < inner; ++k) {
      const Vec row = load_b(b + k * n + i);
      for (int r = 0; r < kRows; ++r) sum[r] = VecMath::fma(VecMath::set(a[r * inner + k]), row, sum[r]);
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
float* perturb_copy(const TTFactorsParams& p, const Tiling& tiling, int64_t probe, float* buffer) {
  const uint64_t base = tiling.range(0).base;
  float* theta = buffer + (p.offset - base);
  memcpy(theta, p.theta, tiling.numel * sizeof(float));
  if (p.scales[probe] == 0.0f) return theta;
  const int64_t tiles = tiling.count();
  for (int64_t i = 0; i < tiles; ++i) {
    const TileRange range = tiling.range(i);
    add_direction(buffer + (range.base - base), range, p.seeds[probe], p.scales[probe], p.distribution);
  }
  return theta;
}

}  // namespace

void tt_factors(const TTFactorsParams& p) {
  const Tiling tiling{p.offset, theta_numel(p.layout)};
  const int64_t copy_numel = tiling.count() * kTile, factors = factor_numel(p.layout);
  const Scratch scratch(p.threads, copy_numel + 2 * factors_scratch(p.layout));
  for_ranges(p.threads, p.probes, [&](int thread, int64_t first, int64_t last) {
    const DefaultRounding rounding;
    float* buffer = scratch.of(thread);
    memset(buffer, 0, copy_numel * sizeof(float));
    for (int64_t probe = first; probe < last; ++probe) {
      const float* theta = perturb_copy(p, tiling, probe, buffer);
      contract_adapter(p.layout, theta, buffer + copy_numel, p.out + probe * factors, MatrixOps{});
    }
  });
}

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
