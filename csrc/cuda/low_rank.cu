// tt_linear and low_rank_linear on a GPU, one kernel: y = base + scale ((x L) R + bias), base and bias may be null.
#include "cuda/token_tile.h"

namespace adazeta {
namespace {

struct LowRankArguments {
  LowRankParams p;
  TokenTiles tiles;
};

template <int kTokens, class Access>
__global__ void __launch_bounds__(kThreads, 1) low_rank_kernel(const __grid_constant__ LowRankArguments a) {
  __shared__ float partial[kWarps * kTokens * kRanks], h[kTokens * kMaxRank];
  const LowRankParams& p = a.p;
  const Access x(p.x), base(p.base), y(p.y);
  for (int64_t tile = blockIdx.x; tile < a.tiles.count; tile += gridDim.x) {
    const int64_t probe = tile / a.tiles.per_probe, token = tile % a.tiles.per_probe * kTokens;
    const int64_t left = p.tokens - token, row = probe * p.tokens + token;
    const int count = left < kTokens ? static_cast<int>(left) : kTokens;
    project<kTokens>(x, row * p.d_in, count, {0, p.d_in, p.d_in}, p.rank, partial, h, p.left + probe * p.left_stride);
    for (int i = threadIdx.x; i < kTokens * p.rank; i += kThreads) h[i / p.rank * kMaxRank + i % p.rank] *= p.scale;
    __syncthreads();
    expand<kTokens>(base, y, row * p.d_out, count, {0, p.d_out, p.d_out},
                    {h, kMaxRank, p.right + probe * p.right_stride, p.d_out, p.rank},
                    p.bias == nullptr ? nullptr : p.bias + probe * p.bias_stride, p.scale);
    __syncthreads();  // nobody writes the next tile's h while this one's is read
  }
}

template <int kTokens, class Access>
int launch_low_rank(const LowRankParams& p, CudaStream where) {
  const LowRankArguments arguments{p, token_tiles(p.probes, p.tokens, kTokens)};
  unsigned blocks = 0;
  const cudaError_t error = grid_size(where.device, arguments.tiles.count, &blocks);
  return error != cudaSuccess ? error : launch(&low_rank_kernel<kTokens, Access>, blocks, 0, where, arguments);
}

}  // namespace

int cuda_low_rank(const LowRankParams& p, CudaStream where) {
  if (p.probes == 0 || p.tokens == 0 || p.d_out == 0) return cudaSuccess;
  const DeviceGuard guard(where.device);
  if (guard.error() != cudaSuccess) return guard.error();
  bool few = false;
  const cudaError_t error = few_tokens(where.device, p.probes, p.tokens, &few);
  if (error != cudaSuccess) return error;
  if (few) return launch_low_rank<1, AnyAccess>(p, where);
  const bool aligned = vectors(p.x, p.d_in) && vectors(p.base, p.d_out) && vectors(p.y, p.d_out);
  if (!aligned) return launch_low_rank<kManyTokens / 2, AnyAccess>(p, where);
  return with_vectors(
      p.x.dtype, [&](auto access) { return launch_low_rank<kManyTokens, typename decltype(access)::Type>(p, where); });
}

}  // namespace adazeta
