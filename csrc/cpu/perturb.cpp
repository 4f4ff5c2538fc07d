// perturb_: theta <- decay theta + sum_j scales[j] z(seeds[j]), in place over a list of tensors, in one pass.
#include "levels.h"
#include "tile.h"

namespace adazeta {
namespace ADAZETA_LEVEL {
namespace {

// The last tensor that begins at or before `position`.
int64_t find_tensor(const PerturbParams& p, int64_t position) {
  int64_t low = 0, high = p.tensor_count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (p.tensors[middle].begin <= position ? low : high) = middle;
  }
  return low;
}

// Position behind the last element of tensor t.
int64_t tensor_end(const PerturbParams& p, int64_t t) {
  return t + 1 < p.tensor_count ? p.tensors[t + 1].begin : p.numel;
}

// Calls visit(tensor, first element in it, place in the tile, count) for each piece of a tensor in the tile.
template <class Visit>
ADAZETA_HD void for_pieces(const PerturbParams& p, int64_t position, const TileRange& range, Visit visit) {
  int64_t t = find_tensor(p, position);
  for (int place = range.first; place < range.last; ++t) {
    const TensorRef& tensor = p.tensors[t];
    const int64_t end = tensor_end(p, t);
    const int left = range.last - place;
    const int n = end - position < left ? static_cast<int>(end - position) : left;
    visit(tensor, position - tensor.begin, place, n);
    position += n;
    place += n;
  }
}

// Asks for the cache lines of a stretch of the concatenation, a part at a time.
class Fetcher {
 public:
  Fetcher(const PerturbParams& p, int64_t position) : p_(p), position_(position) {
    if (position < p.numel) tensor_ = find_tensor(p, position);
  }
  // The next `count` elements, as far as there are any.
  void fetch(int64_t count) {
    const int64_t last = count < p_.numel - position_ ? position_ + count : p_.numel;
    while (position_ < last) {
      const TensorRef& tensor = p_.tensors[tensor_];
      const int64_t end = tensor_end(p_, tensor_), stop = end < last ? end : last, size = element_size(tensor.dtype);
      const char* data = static_cast<const char*>(tensor.data);
      for (int64_t at = (position_ - tensor.begin) * size; at < (stop - tensor.begin) * size; at += 64) {
        __builtin_prefetch(data + at, 1);
      }
      position_ = stop;
      tensor_ += stop == end;
    }
  }

 private:
  const PerturbParams& p_;
  int64_t position_, tensor_ = 0;
};

// add_direction on the whole tile. Making normals leaves the memory idle: meanwhile the next tile's cache lines are
// fetched, evenly spread, where the hardware would begin only when they are asked for.
void add_normals_fetching(float* tile, const TileRange& range, uint64_t seed, float scale, Fetcher next) {
  for (int first = range.first, last; first < range.last; first = last) {
    last = (first / kGroupWords + 1) * kGroupWords;
    if (last > range.last) last = range.last;
    add_direction(tile, {range.base, first, last}, seed, scale, Distribution::kGaussian);
    next.fetch(kGroupWords);
  }
}

void add_all(const PerturbParams& p, float* tile, const TileRange& range, int64_t position) {
  for (int64_t j = 0; j < p.seed_count; ++j) {
    // A zero scale adds nothing, not even the sign of a zero (docs/perturbation-spec.md, section 6).
    if (p.scales[j] == 0.0f) continue;
    if (j == 0 && p.distribution == Distribution::kGaussian) {
      const Fetcher next(p, position + range.last - range.first);
      add_normals_fetching(tile, range, p.seeds[j], p.scales[j], next);
    } else {
      add_direction(tile, range, p.seeds[j], p.scales[j], p.distribution);
    }
  }
}

// Where the tile lies if all of it is float32 numbers of one tensor, else null.
float* whole_tile(const PerturbParams& p, int64_t position, const TileRange& range) {
  if (range.first != 0 || range.last != kTile) return nullptr;
  const int64_t t = find_tensor(p, position);
  if (position + kTile > tensor_end(p, t) || p.tensors[t].dtype != Dtype::kFloat32) return nullptr;
  return static_cast<float*>(p.tensors[t].data) + (position - p.tensors[t].begin);
}

void perturb_tile(const PerturbParams& p, const Tiling& tiling, int64_t index) {
  const TileRange range = tiling.range(index);
  const int64_t position = tiling.position(range);
  if (float* theta = whole_tile(p, position, range)) {
    if (p.decay != 1.0f) {
      for (int i = 0; i < kTile; ++i) theta[i] *= p.decay;
    }
    return add_all(p, theta, range, position);
  }
  alignas(64) float tile[kTile];
  if (range.first != 0 || range.last != kTile) memset(tile, 0, sizeof(tile));
  for_pieces(p, position, range, [&](const TensorRef& tensor, int64_t begin, int place, int n) {
    load(tile + place, tensor.data, tensor.dtype, begin, n, p.decay);
  });
  add_all(p, tile, range, position);
  for_pieces(p, position, range, [&](const TensorRef& tensor, int64_t begin, int place, int n) {
    store(tensor.data, tensor.dtype, begin, n, tile + place);
  });
}

}  // namespace

void perturb(const PerturbParams& p) {
  const Tiling tiling{p.offset, p.numel};
  const int64_t tiles = tiling.count();
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const DefaultRounding rounding;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) perturb_tile(p, tiling, i);
  }
}

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
