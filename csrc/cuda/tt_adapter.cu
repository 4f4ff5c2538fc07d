// tt_adapter on a GPU: y = x + scale ((act((x L1) R1 + b1) L2) R2 + b2), one pass over x, factors per probe.
//
// A block takes a tile of tokens. Where there are fewer tokens than processors, several blocks share a token, each with
// a part of its columns, in two launches: the first writes every part of x L1, the second adds these up, in their
// order.
#include "cuda/bottleneck.h"

namespace adazeta {
namespace {

struct TTAdapterArguments {
  TTAdapterParams p;
  TokenTiles tiles;
  float* sums;  // of x L1: [tokens of all probes, parts, rank_down]
  Split split;
};

template <int kTokens, class Access>
__global__ void __launch_bounds__(kThreads, 1) tt_adapter_kernel(const __grid_constant__ TTAdapterArguments a) {
  __shared__ float partial[kWarps * kTokens * kRanks], h[kTokens * kMaxRank];
  ADAZETA_DYNAMIC_SHARED(u);
  const TTAdapterParams& p = a.p;
  const Columns columns{0, p.width, p.width};
  const Access x(p.x), y(p.y);
  for (int64_t tile = blockIdx.x; tile < a.tiles.count; tile += gridDim.x) {
    const int64_t probe = tile / a.tiles.per_probe, token = tile % a.tiles.per_probe * kTokens;
    const int64_t left = p.tokens - token, begin = (probe * p.tokens + token) * p.width;
    const int count = left < kTokens ? static_cast<int>(left) : kTokens;
    const Factors f = split(p, probe);
    project<kTokens>(x, begin, count, columns, p.rank_down, partial, h, f.left_down);
    narrow_part<kTokens>(p, f, u, h);
    expand<kTokens>(x, y, begin, count, columns, {h, kMaxRank, f.right_up, p.width, p.rank_up}, f.bias_up, p.scale);
    __syncthreads();  // nobody writes the next tile's h while this one's is read
  }
}

// blockIdx.x: token, blockIdx.y: part of its columns.
__global__ void __launch_bounds__(kThreads) tt_adapter_project_kernel(const __grid_constant__ TTAdapterArguments a) {
  __shared__ float partial[kWarps * kRanks], h[kMaxRank];
  const TTAdapterParams& p = a.p;
  const int64_t token = blockIdx.x;
  const Factors f = split(p, token / p.tokens);
  project<1>(AnyAccess(p.x), token * p.width, 1, a.split.part(blockIdx.y, p.width), p.rank_down, partial, h,
             f.left_down);
  float* sums = a.sums + (token * a.split.parts + blockIdx.y) * p.rank_down;
  for (int j = threadIdx.x; j < p.rank_down; j += kThreads) sums[j] = h[j];
}

__global__ void __launch_bounds__(kThreads) tt_adapter_expand_kernel(const __grid_constant__ TTAdapterArguments a) {
  __shared__ float h[kMaxRank];
  ADAZETA_DYNAMIC_SHARED(u);
  const TTAdapterParams& p = a.p;
  const int64_t token = blockIdx.x;
  const Factors f = split(p, token / p.tokens);
  const float* sums = a.sums + token * a.split.parts * p.rank_down;
  for (int j = threadIdx.x; j < p.rank_down; j += kThreads) {
    float sum = 0.0f;
    for (int part = 0; part < a.split.parts; ++part) sum += sums[part * p.rank_down + j];
    h[j] = sum;
  }
  __syncthreads();
  narrow_part<1>(p, f, u, h);
  expand<1>(AnyAccess(p.x), AnyAccess(p.y), token * p.width, 1, a.split.part(blockIdx.y, p.width),
            {h, kMaxRank, f.right_up, p.width, p.rank_up}, f.bias_up, p.scale);
}

template <int kTokens, class Access>
int launch_tiles(TTAdapterArguments& arguments, CudaStream where) {
  const TTAdapterParams& p = arguments.p;
  arguments.tiles = token_tiles(p.probes, p.tokens, kTokens);
  unsigned blocks = 0;
  const cudaError_t error = grid_size(where.device, arguments.tiles.count, &blocks);
  if (error != cudaSuccess) return error;
  return launch(&tt_adapter_kernel<kTokens, Access>, blocks, sizeof(float) * kTokens * p.bottleneck, where, arguments);
}

int launch_parts(const TTAdapterArguments& arguments, CudaStream where) {
  const TTAdapterParams& p = arguments.p;
  const dim3 grid(static_cast<unsigned>(p.probes * p.tokens), static_cast<unsigned>(arguments.split.parts));
  const cudaError_t error = launch(&tt_adapter_project_kernel, grid, 0, where, arguments);
  if (error != cudaSuccess) return error;
  return launch(&tt_adapter_expand_kernel, grid, sizeof(float) * p.bottleneck, where, arguments);
}

}  // namespace

int cuda_tt_adapter_scratch(const TTAdapterParams& p, CudaStream where, int64_t* floats) {
  Split split;
  const cudaError_t error = split_columns(where.device, p.probes * p.tokens, p.width, &split);
  *floats = split.parts == 1 ? 0 : p.probes * p.tokens * split.parts * p.rank_down;
  return error;
}

int cuda_tt_adapter(const TTAdapterParams& p, float* scratch, CudaStream where) {
  if (p.probes == 0 || p.tokens == 0) return cudaSuccess;
  const DeviceGuard guard(where.device);
  if (guard.error() != cudaSuccess) return guard.error();
  TTAdapterArguments arguments{p, {}, scratch, {}};
  cudaError_t error = split_columns(where.device, p.probes * p.tokens, p.width, &arguments.split);
  if (error != cudaSuccess) return error;
  if (arguments.split.parts > 1) {
    return scratch == nullptr ? cudaErrorInvalidValue : launch_parts(arguments, where);
  }
  bool few = false;
  error = few_tokens(where.device, p.probes, p.tokens, &few);
  if (error != cudaSuccess) return error;
  if (few) return launch_tiles<1, AnyAccess>(arguments, where);
  if (!vectors(p.x, p.width) || !vectors(p.y, p.width))
    return launch_tiles<kManyTokens / 2, AnyAccess>(arguments, where);
  return with_vectors(p.x.dtype, [&](auto access) {
    return launch_tiles<kManyTokens, typename decltype(access)::Type>(arguments, where);
  });
}

}  // namespace adazeta
