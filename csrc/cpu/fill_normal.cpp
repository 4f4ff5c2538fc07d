// fill_normal_: out[i] <- element offset + i of the direction of one seed.
#include "levels.h"
#include "tile.h"

namespace adazeta {
namespace ADAZETA_LEVEL {

void fill_normal(const FillNormalParams& p) {
  const Tiling tiling{p.offset, p.numel};
  const int64_t tiles = tiling.count();
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const DefaultRounding rounding;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      const TileRange range = tiling.range(i);
      alignas(64) float tile[kTile];
      if (p.distribution == Distribution::kRademacher) {
        memset(tile, 0, sizeof(tile));
        add_direction(tile, range, p.seed, 1.0f, p.distribution);
      } else {
        // Written, not added to zeros: adding would lose the sign of a zero.
        for (int g = range.first / kGroupWords; g * kGroupWords < range.last; ++g) {
          gaussian_group(p.seed, range.base / 4 + g * kGroupBlocks,
                         [&](int place, FloatRegister z) { memcpy(tile + g * kGroupWords + place, &z, sizeof(z)); });
        }
      }
      store(p.out.data, p.out.dtype, tiling.position(range), range.last - range.first, tile + range.first);
    }
  }
}

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
