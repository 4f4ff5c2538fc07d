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

// A position in the concatenation, and the tensor it lies in.
struct Place {
  int64_t position, tensor;

  void advance(const PerturbParams& p, int64_t count) {
    position += count;
    while (tensor + 1 < p.tensor_count && tensor_end(p, tensor) <= position) ++tensor;
  }
};

// Calls visit(tensor, first element in it, place in the tile, count) for each piece of a tensor in the tile, which
// begins at `at`. Returns the place behind it.
template <class Visit>
ADAZETA_HD Place for_pieces(const PerturbParams& p, Place at, const TileRange& range, Visit visit) {
  for (int place = range.first; place < range.last;) {
    const TensorRef& tensor = p.tensors[at.tensor];
    const int64_t rest = tensor_end(p, at.tensor) - at.position;
    const int left = range.last - place;
    const int n = rest < left ? static_cast<int>(rest) : left;
    visit(tensor, at.position - tensor.begin, place, n);
    at.advance(p, n);
    place += n;
  }
  return at;
}

// Asks for the cache lines of a stretch of the concatenation, a part at a time.
class Fetcher {
 public:
  Fetcher(const PerturbParams& p, Place at) : p_(p), at_(at) {}
  // The next `count` elements, as far as there are any.
  void fetch(int64_t count) {
    const int64_t last = count < p_.numel - at_.position ? at_.position + count : p_.numel;
    while (at_.position < last) {
      const TensorRef& tensor = p_.tensors[at_.tensor];
      const int64_t end = tensor_end(p_, at_.tensor), stop = end < last ? end : last, size = element_size(tensor.dtype);
      const char* data = static_cast<const char*>(tensor.data);
      for (int64_t byte = (at_.position - tensor.begin) * size; byte < (stop - tensor.begin) * size; byte += 64) {
        __builtin_prefetch(data + byte, 1);
      }
      at_.advance(p_, stop - at_.position);
    }
  }

 private:
  const PerturbParams& p_;
  Place at_;
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

void add_all(const PerturbParams& p, float* tile, const TileRange& range, Place next) {
  for (int64_t j = 0; j < p.seed_count; ++j) {
    // A zero scale adds nothing, not even the sign of a zero (docs/perturbation-spec.md, section 6).
    if (p.scales[j] == 0.0f) continue;
    if (j == 0 && p.distribution == Distribution::kGaussian) {
      add_normals_fetching(tile, range, p.seeds[j], p.scales[j], Fetcher(p, next));
    } else {
      add_direction(tile, range, p.seeds[j], p.scales[j], p.distribution);
    }
  }
}

// Where the tile lies if all of it is float32 numbers of one tensor, else null.
float* whole_tile(const PerturbParams& p, Place at, const TileRange& range) {
  const TensorRef& tensor = p.tensors[at.tensor];
  if (range.first != 0 || range.last != kTile || tensor.dtype != Dtype::kFloat32) return nullptr;
  if (at.position + kTile > tensor_end(p, at.tensor)) return nullptr;
  return static_cast<float*>(tensor.data) + (at.position - tensor.begin);
}

// Returns the place behind the tile, which begins at `at`.
Place perturb_tile(const PerturbParams& p, const TileRange& range, Place at) {
  if (float* theta = whole_tile(p, at, range)) {
    if (p.decay != 1.0f) {
      for (int i = 0; i < kTile; ++i) theta[i] *= p.decay;
    }
    at.advance(p, kTile);
    add_all(p, theta, range, at);
    return at;
  }
  alignas(64) float tile[kTile];
  if (range.first != 0 || range.last != kTile) memset(tile, 0, sizeof(tile));
  const Place next = for_pieces(p, at, range, [&](const TensorRef& tensor, int64_t begin, int place, int n) {
    load(tile + place, tensor.data, tensor.dtype, begin, n, p.decay);
  });
  add_all(p, tile, range, next);
  for_pieces(p, at, range, [&](const TensorRef& tensor, int64_t begin, int place, int n) {
    store(tensor.data, tensor.dtype, begin, n, tile + place);
  });
  return next;
}

}  // namespace

void perturb(const PerturbParams& p) {
  const Tiling tiling{p.offset, p.numel};
  const int64_t tiles = tiling.count();
#pragma omp parallel num_threads(p.threads) if (p.threads > 1)
  {
    const DefaultRounding rounding;
    Place at{-1, 0};
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) {
      const TileRange range = tiling.range(i);
      const int64_t position = tiling.position(range);
      if (at.position != position) at = {position, find_tensor(p, position)};  // a thread's first tile
      at = perturb_tile(p, range, at);
    }
  }
}

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
