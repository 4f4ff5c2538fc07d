// Products of a few tokens of one probe with its factors, by all threads of a block; float32 sums.
//
// Threads divide the columns of x among them, so a block has work with one token as well as with many. A tile of
// kTokens tokens shares every load of a factor. Factors are in device memory, or expanded from what a block has in its
// shared memory (tt_adapter_from_cores.cu).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "adazeta/fma.h"
#include "adazeta/params.h"
#include "cuda/access.h"
#include "cuda/group.h"
#include "cuda/launch.h"

namespace adazeta {

constexpr int kWarpLanes = 32;
constexpr int kWarps = kThreads / kWarpLanes;
constexpr int kManyTokens = 16;  // of a tile, where there are enough
constexpr int kRanks = 5;        // columns of a left factor, or rows of a right one, in one pass over a tile

// Tiles of `tokens` tokens of every probe, one after another.
struct TokenTiles {
  int64_t tokens, per_probe, count;
};
inline TokenTiles token_tiles(int64_t probes, int64_t tokens, int tile) {
  const int64_t per_probe = (tokens + tile - 1) / tile;
  return {tokens, per_probe, probes * per_probe};
}

// Whether every token should get a block of its own: where a probe has too few for a tile to share its factors, or
// where tiles would leave most processors idle. A tile reads the factors once, which by the bandwidths of an H100 takes
// as long as 6 to 8 tokens do; no GPU has timed this yet.
inline cudaError_t few_tokens(int device, int64_t probes, int64_t tokens, bool* few) {
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  *few = tokens < 4 || 6 * token_tiles(probes, tokens, kManyTokens).count < processors;
  return error;
}

// The part of the columns 0 .. d - 1 that a block works on; `from` is a multiple of kGroup, `to` another one or d.
struct Columns {
  int64_t from, to, d;
};

// Parts of a token's columns, all of one size but the last.
struct Split {
  int parts;
  int64_t size;
  ADAZETA_HD Columns part(int64_t i, int64_t d) const { return {i * size, (i + 1) * size < d ? (i + 1) * size : d, d}; }
};

// One part where the tokens alone keep half of the processors busy or d is short; else enough for two a processor.
inline cudaError_t split_columns(int device, int64_t tokens, int64_t d, Split* split) {
  constexpr int64_t kSmallest = 512;  // columns of a part: 16 bytes of bfloat16 for every lane of two warps
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t wanted = tokens == 0 ? 1 : 2 * processors / tokens, most = d / kSmallest;
  const int64_t parts = wanted < most ? wanted : most;
  split->size = parts < 2 ? d : ((d + parts - 1) / parts + kGroup - 1) / kGroup * kGroup;
  split->parts = parts < 2 ? 1 : static_cast<int>((d + split->size - 1) / split->size);
  return error;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int mask = kWarpLanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// l <- rows c .. c + 7, columns first .. first + kRanks - 1 of left (d, rank); zeros outside it.
__device__ __forceinline__ void load_left(const float* left, int64_t d, int rank, int64_t c, int first,
                                          float (&l)[kGroup * kRanks]) {
  const float* from = left + c * rank;
  if (rank == kRanks && c + kGroup <= d && aligned_16(from, Dtype::kFloat32, 0)) {
    const float4* vectors = reinterpret_cast<const float4*>(from);
#pragma unroll
    for (int i = 0; i < kGroup * kRanks / 4; ++i) {
      const float4 v = vectors[i];
      l[4 * i] = v.x, l[4 * i + 1] = v.y, l[4 * i + 2] = v.z, l[4 * i + 3] = v.w;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup * kRanks; ++i) {
    const int row = i / kRanks, column = first + i % kRanks;
    l[i] = c + row < d && column < rank ? from[row * rank + column] : 0.0f;
  }
}

// The numbers of kHeld tokens at the columns c .. c + 7, from `token` on. Tokens that do not exist repeat
// the last one: nothing is branched on, and all loads are under way at once.
template <int kHeld, class Access>
__device__ __forceinline__ void load_tokens(const Access& x, int64_t begin, int token, int count, int64_t d, int64_t c,
                                            typename Access::Raw (&raw)[kHeld]) {
#pragma unroll
  for (int t = 0; t < kHeld; ++t) {
    const int64_t row = begin + (token + t < count ? token + t : count - 1) * d;
    raw[t] = x.load(row + c, row + d);
  }
}

// h[t * kMaxRank + j] <- sum_i x[t][i] left[i][j] over the columns, for t < count; the first token begins at element
// `begin` of x. load(c, first, l) does what load_left does. Shared: h, and partial[kWarps * kTokens * kRanks]. Ends
// with a barrier. A rank above kRanks takes more passes over the tile.
template <int kTokens, class Access, class Load>
__device__ __forceinline__ void project(const Access& x, int64_t begin, int count, Columns columns, int rank,
                                        float* partial, float* h, const Load& load) {
  constexpr int kHeld = kTokens < Access::kHeld ? kTokens : Access::kHeld;
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes;
  for (int first = 0; first < rank; first += kRanks) {
    float sum[kTokens][kRanks] = {};
    for (int64_t c = columns.from + threadIdx.x * kGroup; c < columns.to; c += kThreads * kGroup) {
      float l[kGroup * kRanks];
      load(c, first, l);
#pragma unroll
      for (int token = 0; token < kTokens; token += kHeld) {
        if (token >= count) break;
        typename Access::Raw raw[kHeld];
        load_tokens(x, begin, token, count, columns.d, c, raw);
#pragma unroll
        for (int t = 0; t < kHeld; ++t) {
          float v[kGroup];
          x.widen(raw[t], v);
#pragma unroll
          for (int i = 0; i < kGroup * kRanks; ++i) {
            float& total = sum[token + t][i % kRanks];
            total = HardwareFma::apply(v[i / kRanks], l[i], total);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens * kRanks; ++i) {
      const float total = warp_sum(sum[i / kRanks][i % kRanks]);
      if (lane == 0) partial[warp * kTokens * kRanks + i] = total;
    }
    __syncthreads();
    const int i = threadIdx.x;
    if (i < kTokens * kRanks && first + i % kRanks < rank) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += partial[w * kTokens * kRanks + i];
      h[i / kRanks * kMaxRank + first + i % kRanks] = total;
    }
    __syncthreads();
  }
}

// The same with left (d, rank) in device memory.
template <int kTokens, class Access>
__device__ __forceinline__ void project(const Access& x, int64_t begin, int count, Columns columns, int rank,
                                        float* partial, float* h, const float* left) {
  project<kTokens>(x, begin, count, columns, rank, partial, h, [&](int64_t c, int first, float (&l)[kGroup* kRanks]) {
    load_left(left, columns.d, rank, c, first, l);
  });
}

// Rows g and a factor `right` (rank, d) whose product is to be taken. Where inner < d, right is given as cores are: it
// has `inner` columns, and column c of the product takes row c / inner of g's d / inner rows per token, and column
// c % inner of right. inner is then a multiple of kGroup.
struct Product {
  const float* g;  // shared: token t has g[t * stride ..]
  int stride;
  const float* right;
  int64_t inner;
  int rank;
};

// r <- rows first .. first + kRanks - 1 of right at the columns of the product from c on; a row that does not exist
// repeats the first.
__device__ __forceinline__ void load_right(const Product& product, int64_t c, int first, float (&r)[kRanks][kGroup]) {
  const int64_t column = static_cast<unsigned>(c) % static_cast<unsigned>(product.inner);
#pragma unroll
  for (int j = 0; j < kRanks; ++j) {
    const float* from = product.right + (first + j < product.rank ? first + j : first) * product.inner;
    load_group_within(from, Dtype::kFloat32, column, product.inner, r[j]);
  }
}

// y[t] <- base[t] + (g[t] right + scale bias) over the columns, for t < count; the first token begins at element
// `begin` of base and y. base and bias may be null.
template <int kTokens, class Access>
__device__ __forceinline__ void expand(const Access& base, const Access& y, int64_t begin, int count, Columns columns,
                                       const Product& product, const float* bias, float scale) {
  constexpr int kHeld = kTokens < Access::kHeld ? kTokens : Access::kHeld;
  const int64_t d = columns.d;
  for (int64_t c = columns.from + threadIdx.x * kGroup; c < columns.to; c += kThreads * kGroup) {
    const int row = static_cast<unsigned>(c) / static_cast<unsigned>(product.inner) * product.rank;
    float b[kGroup] = {}, r[kRanks][kGroup];
    if (bias != nullptr) load_group_within(bias, Dtype::kFloat32, c, d, b);
    for (int token = 0; token < count; token += kHeld) {
      typename Access::Raw raw[kHeld];
      if (!base.empty()) load_tokens(base, begin, token, count, d, c, raw);
      float sum[kHeld][kGroup] = {};
      for (int first = 0; first < product.rank; first += kRanks) {
        if (token == 0 || product.rank > kRanks) load_right(product, c, first, r);
#pragma unroll
        for (int j = 0; j < kRanks; ++j) {
          if (first + j >= product.rank) break;
#pragma unroll
          for (int t = 0; t < kHeld; ++t) {
            const float factor = product.g[(token + t) * product.stride + row + first + j];
#pragma unroll
            for (int i = 0; i < kGroup; ++i) sum[t][i] = HardwareFma::apply(factor, r[j][i], sum[t][i]);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kHeld; ++t) {
        if (token + t >= count) break;
        float v[kGroup] = {};
        if (!base.empty()) base.widen(raw[t], v);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) v[i] += HardwareFma::apply(scale, b[i], sum[t][i]);
        const int64_t at = begin + (token + t) * d;
        y.store(at + c, at + d, v);
      }
    }
  }
}

}  // namespace adazeta
