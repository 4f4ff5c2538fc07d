// The narrow part of an adapter, between its two maps, for a tile of tokens by all threads of a block.
#pragma once

#include "adazeta/activation.h"
#include "cuda/token_tile.h"

namespace adazeta {

// The factors of a probe; a null bias is absent.
struct Factors {
  const float *left_down, *right_down, *bias_down, *left_up, *right_up, *bias_up;
};

// Where they lie in memory, as contract_adapter writes them.
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

}  // namespace adazeta
