// tt_adapter on a GPU: y = x + scale ((act((x L1) R1 + b1) L2) R2 + b2), one pass over x, factors per probe.
#include "adazeta/activation.h"
#include "cuda/token_tile.h"

namespace adazeta {
namespace {

struct TTAdapterArguments {
  TTAdapterParams p;
  TokenTiles tiles;
};

// Where the factors of a probe lie, as contract_adapter writes them; a null bias is absent.
struct Factors {
  const float *left_down, *right_down, *bias_down, *left_up, *right_up, *bias_up;
};

__device__ __forceinline__ Factors split(const TTAdapterParams& p, int64_t probe) {
  Factors f;
  f.left_down = p.factors + probe * p.factor_stride;
  f.right_down = f.left_down + p.width * p.rank_down;
  f.bias_down = f.right_down + static_cast<int64_t>(p.bottleneck) * p.rank_down;
  f.left_up = f.bias_down + (p.bias ? p.bottleneck : 0);
  f.right_up = f.left_up + static_cast<int64_t>(p.bottleneck) * p.rank_up;
  f.bias_up = f.right_up + p.width * p.rank_up;
  if (!p.bias) f.bias_down = f.bias_up = nullptr;
  return f;
}

__device__ __forceinline__ float activate(Act act, float x) {
  switch (act) {
    case Act::kRelu:
      return activation<ScalarMath, Act::kRelu>(x);
    case Act::kGelu:
      return activation<ScalarMath, Act::kGelu>(x);
    case Act::kSilu:
      return activation<ScalarMath, Act::kSilu>(x);
    case Act::kTanh:
      return activation<ScalarMath, Act::kTanh>(x);
    default:
      return x;
  }
}

// h [kTokens, kMaxRank] -> u = act(h R1 + b1) [kTokens, bottleneck] -> g = scale (u L2), in place of h. Ends with a
// barrier.
template <int kTokens>
__device__ __forceinline__ void narrow_part(const TTAdapterParams& p, const Factors& f, float* u, float* h) {
  for (int i = threadIdx.x; i < kTokens * p.bottleneck; i += kThreads) {
    const int t = i / p.bottleneck, k = i % p.bottleneck;
    float sum = f.bias_down == nullptr ? 0.0f : f.bias_down[k];
    for (int j = 0; j < p.rank_down; ++j) {
      sum = HardwareFma::apply(h[t * kMaxRank + j], f.right_down[j * p.bottleneck + k], sum);
    }
    u[i] = activate(p.act, sum);
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  for (int i = warp; i < kTokens * p.rank_up; i += kWarps) {
    const int t = i / p.rank_up, j = i % p.rank_up;
    float sum = 0.0f;
    for (int k = lane; k < p.bottleneck; k += kWarpLanes) {
      sum = HardwareFma::apply(u[t * p.bottleneck + k], f.left_up[k * p.rank_up + j], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) h[t * kMaxRank + j] = p.scale * sum;
  }
  __syncthreads();
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads, 1) tt_adapter_kernel(const __grid_constant__ TTAdapterArguments a) {
  __shared__ float partial[kWarps * kTokens * kRanks], h[kTokens * kMaxRank];
  ADAZETA_DYNAMIC_SHARED(u);
  const TTAdapterParams& p = a.p;
  for (int64_t tile = blockIdx.x; tile < a.tiles.count; tile += gridDim.x) {
    const int64_t probe = tile / a.tiles.per_probe, token = tile % a.tiles.per_probe * kTokens;
    const int64_t left = p.tokens - token, begin = (probe * p.tokens + token) * p.width;
    const int count = left < kTokens ? static_cast<int>(left) : kTokens;
    const Factors f = split(p, probe);
    project<kTokens>(p.x, begin, count, f.left_down, p.width, p.rank_down, partial, h);
    narrow_part<kTokens>(p, f, u, h);
    expand<kTokens>(p.x, p.y, begin, count, h, f.right_up, p.width, p.rank_up, f.bias_up, p.scale);
    __syncthreads();  // nobody writes the next tile's h while this one's is read
  }
}

template <int kTokens>
int launch_adapter(const TTAdapterParams& p, CudaStream where) {
  const TTAdapterArguments arguments{p, token_tiles(p.probes, p.tokens, kTokens)};
  unsigned blocks = 0;
  const cudaError_t error = grid_size(where.device, arguments.tiles.count, &blocks);
  if (error != cudaSuccess) return error;
  const size_t shared_bytes = sizeof(float) * kTokens * p.bottleneck;
  return launch(&tt_adapter_kernel<kTokens>, blocks, shared_bytes, where, arguments);
}

}  // namespace

int cuda_tt_adapter(const TTAdapterParams& p, CudaStream where) {
  if (p.probes == 0 || p.tokens == 0) return cudaSuccess;
  const DeviceGuard guard(where.device);
  if (guard.error() != cudaSuccess) return guard.error();
  bool few = false;
  const cudaError_t error = few_tokens(where.device, p.probes, p.tokens, &few);
  if (error != cudaSuccess) return error;
  return few ? launch_adapter<1>(p, where) : launch_adapter<kManyTokens>(p, where);
}

}  // namespace adazeta
