// tt_factors and tt_adapter in one kernel, so that no factor touches memory: a block perturbs the cores of one probe
// into its shared memory, and takes tile after tile of that probe's tokens. An alternative that bench_cuda.py compares.
//
// The two wide factors are not written out in shared memory either (4096 x 5 twice is 160 KiB). L1 = A G, A being all
// its cores but the last, G; eight of its rows are expanded in registers where a tile needs them. R2 = G' A', G' being
// its first core: the small g G' is formed for each token, so A' takes R2's place at no further cost.
#include "cuda/bottleneck.h"
#include "cuda/cores.h"

namespace adazeta {
namespace {

constexpr int kTile = 8;

struct FromCoresArguments {
  TTAdapterParams p;
  const float* theta;
  uint64_t offset;
  Distribution distribution;
  TTLayout layout;
  TokenTiles tiles;  // of the probes of this launch
  uint64_t seeds[kLaunchProbes];
  float scales[kLaunchProbes];
};
static_assert(sizeof(FromCoresArguments) <= 4096, "kernel parameters end at 4 KB");

// Where a block's shared memory holds what; every array starts at a multiple of 16 bytes.
struct SharedPlan {
  int64_t moved, wide_down, last_down, right_down, left_up, wide_up, products, u, g, size;
  int64_t products_half;
};
ADAZETA_HD SharedPlan shared_plan(const TTLayout& layout, int64_t bottleneck) {
  const TTMap &down = layout.down, &up = layout.up;
  SharedPlan plan{};
  const auto take = [&plan](int64_t numel) {
    const int64_t at = plan.size;
    plan.size += rounded_up_4(numel);
    return at;
  };
  const FactorsScratch products = factors_scratch(layout);
  const int last = down.in_count - 1, first = up.in_count;
  plan.products_half = products.half;
  plan.moved = take(theta_numel(layout));
  plan.wide_down = take(dims_product(down, 0, last) * down.ranks[last]);
  plan.last_down = take(core_numel(down, last));
  plan.right_down = take(right_numel(down));
  plan.left_up = take(left_numel(up));
  plan.wide_up = take(up.ranks[first + 1] * dims_product(up, first + 1, core_count(up)));
  plan.products = take(products.halves * products.half);
  plan.u = take(kTile * bottleneck);
  plan.g = take(kTile * up.dims[first] * up.ranks[first + 1]);
  return plan;
}

// Whether eight neighbouring rows of L1 share a row of A, and eight columns of R2 a row of G'; and both maps have an A.
bool fits_groups(const TTLayout& layout) {
  const TTMap &down = layout.down, &up = layout.up;
  return down.in_count > 1 && up.out_count > 1 && down.dims[down.in_count - 1] % kGroup == 0 &&
         dims_product(up, up.in_count + 1, core_count(up)) % kGroup == 0;
}

// l <- rows c .. c + 7, columns first .. first + kRanks - 1 of A G; G is (inner, dim, rank).
__device__ __forceinline__ void expand_left(const float* wide, const float* last, int inner, int dim, int rank,
                                            int64_t c, int first, float (&l)[kGroup * kRanks]) {
  const unsigned row = static_cast<unsigned>(c) / static_cast<unsigned>(dim);
  const unsigned at = static_cast<unsigned>(c) % static_cast<unsigned>(dim);
#pragma unroll
  for (int i = 0; i < kGroup * kRanks; ++i) l[i] = 0.0f;
#pragma unroll 1  // several at a time would not fit in the registers
  for (int k = 0; k < inner; ++k) {
    const float factor = wide[row * inner + k];
    float part[kGroup * kRanks];
    load_left(last + static_cast<int64_t>(k) * dim * rank, dim, rank, at, first, part);
#pragma unroll
    for (int i = 0; i < kGroup * kRanks; ++i) l[i] = HardwareFma::apply(factor, part[i], l[i]);
  }
}

// blockIdx.x: which tiles of the probe blockIdx.y.
template <class Access>
__global__ void __launch_bounds__(kThreads, 1)
    tt_adapter_from_cores_kernel(const __grid_constant__ FromCoresArguments a) {
  __shared__ float partial[kWarps * kTile * kRanks], h[kTile * kMaxRank];
  ADAZETA_DYNAMIC_SHARED(shared);
  const TTAdapterParams& p = a.p;
  const Access x(p.x), y(p.y);
  const TTMap &down = a.layout.down, &up = a.layout.up;
  const SharedPlan plan = shared_plan(a.layout, p.bottleneck);
  float* moved = shared + plan.moved;
  const uint64_t seed = a.seeds[blockIdx.y];
  const float scale = a.scales[blockIdx.y];
  if (a.distribution == Distribution::kGaussian) {
    perturb_cores<Distribution::kGaussian>(a.theta, theta_numel(a.layout), a.offset, seed, scale, moved);
  } else {
    perturb_cores<Distribution::kRademacher>(a.theta, theta_numel(a.layout), a.offset, seed, scale, moved);
  }
  const BlockOps ops;
  float* products = shared + plan.products;
  const auto contract = [&](const TTMap& map, const float* cores, int first, int last, int64_t to) {
    contract_chain(map, first, last, cores, products, plan.products_half, shared + to, ops);
    return shared + to;
  };
  const float* cores_up = moved + map_numel(down) + (p.bias ? p.bottleneck : 0);
  const int last = down.in_count - 1, first = up.in_count;
  const float* wide_down = contract(down, moved, 0, last, plan.wide_down);
  const float* last_down = contract(down, moved, last, last + 1, plan.last_down);
  const float* wide_up = contract(up, cores_up, first + 1, core_count(up), plan.wide_up);
  const float* first_up = cores_up + core_begin(up, first);
  Factors f{};
  f.right_down = contract(down, moved, down.in_count, core_count(down), plan.right_down);
  f.left_up = contract(up, cores_up, 0, up.in_count, plan.left_up);
  if (p.bias) {
    f.bias_down = moved + map_numel(down);
    f.bias_up = cores_up + map_numel(up);
  }
  float *u = shared + plan.u, *g = shared + plan.g;
  const Columns columns{0, p.width, p.width};
  const int rows = up.dims[first] * up.ranks[first + 1];  // columns of G'
  const Product product{g, rows, wide_up, p.width / up.dims[first], up.ranks[first + 1]};
  for (int64_t tile = blockIdx.x; tile < a.tiles.per_probe; tile += gridDim.x) {
    const int64_t token = tile * kTile, left = p.tokens - token;
    const int64_t begin = (blockIdx.y * p.tokens + token) * p.width;
    const int count = left < kTile ? static_cast<int>(left) : kTile;
    project<kTile>(x, begin, count, columns, p.rank_down, partial, h,
                   [&](int64_t c, int column, float (&l)[kGroup* kRanks]) {
                     expand_left(wide_down, last_down, down.ranks[last], down.dims[last], p.rank_down, c, column, l);
                   });
    narrow_part<kTile>(p, f, u, h);
    for (int i = threadIdx.x; i < kTile * rows; i += kThreads) {
      float sum = 0.0f;
      for (int j = 0; j < p.rank_up; ++j) {
        sum = HardwareFma::apply(h[i / rows * kMaxRank + j], first_up[j * rows + i % rows], sum);
      }
      g[i] = sum;
    }
    __syncthreads();
    expand<kTile>(x, y, begin, count, columns, product, f.bias_up, p.scale);
    __syncthreads();  // nobody writes the next tile's h and g while this one's are read
  }
}

}  // namespace

int cuda_tt_adapter_from_cores(const TTAdapterParams& p, const TTFactorsParams& cores, CudaStream where) {
  if (p.probes == 0 || p.tokens == 0) return cudaSuccess;
  if (!fits_groups(cores.layout) || !vectors(p.x, p.width) || !vectors(p.y, p.width)) return cudaErrorInvalidValue;
  const DeviceGuard guard(where.device);
  if (guard.error() != cudaSuccess) return guard.error();
  int processors = 0;
  cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, where.device);
  FromCoresArguments arguments{};
  arguments.p = p;
  arguments.theta = cores.theta;
  arguments.offset = cores.offset;
  arguments.distribution = cores.distribution;
  arguments.layout = cores.layout;
  const size_t shared_bytes = sizeof(float) * shared_plan(cores.layout, p.bottleneck).size;
  const int64_t row_bytes = p.tokens * p.width * element_bytes(p.x.dtype);
  for (int64_t first = 0; first < p.probes && error == cudaSuccess; first += kLaunchProbes) {
    const int64_t probes = p.probes - first < kLaunchProbes ? p.probes - first : kLaunchProbes;
    arguments.p.x.data = static_cast<char*>(p.x.data) + first * row_bytes;
    arguments.p.y.data = static_cast<char*>(p.y.data) + first * row_bytes;
    arguments.tiles = token_tiles(probes, p.tokens, kTile);
    for (int64_t i = 0; i < probes; ++i) {
      arguments.seeds[i] = cores.seeds[first + i];
      arguments.scales[i] = cores.scales[first + i];
    }
    const int64_t wanted = (processors + probes - 1) / probes;  // registers leave room for one block a processor
    const int64_t blocks = wanted < arguments.tiles.per_probe ? wanted : arguments.tiles.per_probe;
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(probes));
    const int code = with_vectors(p.x.dtype, [&](auto access) {
      return launch(&tt_adapter_from_cores_kernel<typename decltype(access)::Type>, grid, shared_bytes, where,
                    arguments);
    });
    error = static_cast<cudaError_t>(code);
  }
  return error;
}

}  // namespace adazeta
