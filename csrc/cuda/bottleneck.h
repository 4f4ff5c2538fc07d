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
  for (int t = warp; t < kTokens; t += kWarps) {
    for (int first = 0; first < p.rank_up; first += kRanks) {
      float sum[kRanks] = {};
      for (int k = lane; k < p.bottleneck; k += kWarpLanes) {
        const float* row = f.left_up + k * p.rank_up + first;
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
          sum[j] = HardwareFma::apply(u[t * p.bottleneck + k], first + j < p.rank_up ? row[j] : 0.0f, sum[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kRanks; ++j) sum[j] = warp_sum(sum[j]);
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        if (lane == 0 && first + j < p.rank_up) h[t * kMaxRank + first + j] = p.scale * sum[j];
      }
    }
  }
  __syncthreads();
}

}  // namespace adazeta
