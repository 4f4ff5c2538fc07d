// perturb_rows: row p of out is theta + scales[p] z(seeds[p]), the same bits that perturb_ would write.
#include "levels.h"
#include "tile.h"

namespace adazeta {
namespace ADAZETA_LEVEL {

void perturb_rows(const PerturbRowsParams& p) {
  const Tiling tiling{p.offset, p.numel};
  const int64_t tiles = tiling.count();
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const DefaultRounding rounding;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.rows * tiles; ++i) {
      const int64_t row = i / tiles;
      const TileRange range = tiling.range(i % tiles);
      const int64_t position = tiling.position(range);
      const int n = range.last - range.first;
      alignas(64) float tile[kTile];
      if (n != kTile) memset(tile, 0, sizeof(tile));
      load(tile + range.first, p.theta, Dtype::kFloat32, position, n, 1.0f);
      if (p.scales[row] != 0.0f) add_direction(tile, range, p.seeds[row], p.scales[row], p.distribution);
      store(p.out, Dtype::kFloat32, row * p.numel + position, n, tile + range.first);
    }
  }
}

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
