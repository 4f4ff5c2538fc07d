// The cores of one adapter at one probe, perturbed and contracted by all threads of a block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "adazeta/tt.h"
#include "cuda/group.h"
#include "cuda/launch.h"

namespace adazeta {

ADAZETA_HD int64_t rounded_up_4(int64_t numel) { return (numel + 3) / 4 * 4; }

// moved <- theta + scale z(seed), theta[0] having index `offset`. Ends with a barrier.
template <Distribution kDistribution>
__device__ __forceinline__ void perturb_cores(const float* theta, int64_t numel, uint64_t offset, uint64_t seed,
                                              float scale, float* moved) {
  const uint64_t first = offset / kGroup, last = (offset + static_cast<uint64_t>(numel) - 1) / kGroup;
  for (uint64_t g = first + threadIdx.x; g <= last; g += kThreads) {
    const int64_t at = static_cast<int64_t>(g * kGroup - offset);
    float acc[kGroup];
    load_group_within(theta, Dtype::kFloat32, at, numel, acc);
    add_direction_group<kDistribution>(seed, scale, g * kGroup, acc);
    store_group_within(moved, Dtype::kFloat32, at, numel, acc);
  }
  __syncthreads();
}

// What contract_chain asks for. Every sum runs over k in order, whichever path it takes.
struct BlockOps {
  __device__ __forceinline__ void copy(float* to, const float* from, int64_t n) const {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) to[i] = from[i];
    __syncthreads();
  }
  __device__ __forceinline__ void multiply(float* c, const float* a, const float* b, int64_t m, int depth,
                                           int64_t n) const {
    if (n % 4 == 0 && aligned_16(b, Dtype::kFloat32, 0) && aligned_16(c, Dtype::kFloat32, 0)) {
      multiply_by_4(c, a, b, m, depth, n);
    } else {
      const unsigned columns = static_cast<unsigned>(n), numel = static_cast<unsigned>(m * n);
      for (unsigned i = threadIdx.x; i < numel; i += kThreads) {
        const unsigned row = i / columns, column = i % columns;
        float sum = 0.0f;
        for (int k = 0; k < depth; ++k) sum = HardwareFma::apply(a[row * depth + k], b[k * columns + column], sum);
        c[i] = sum;
      }
    }
    __syncthreads();
  }

 private:
  // Four columns of a row at a time, in accesses of 16 bytes.
  __device__ __forceinline__ void multiply_by_4(float* c, const float* a, const float* b, int64_t m, int depth,
                                                int64_t n) const {
    const float4* b4 = reinterpret_cast<const float4*>(b);
    const unsigned columns = static_cast<unsigned>(n / 4), numel = static_cast<unsigned>(m) * columns;
    for (unsigned i = threadIdx.x; i < numel; i += kThreads) {
      const unsigned row = i / columns, column = i % columns;
      float4 sum{0.0f, 0.0f, 0.0f, 0.0f};
      for (int k = 0; k < depth; ++k) {
        const float factor = a[row * depth + k];
        const float4 values = b4[k * columns + column];
        sum.x = HardwareFma::apply(factor, values.x, sum.x);
        sum.y = HardwareFma::apply(factor, values.y, sum.y);
        sum.z = HardwareFma::apply(factor, values.z, sum.z);
        sum.w = HardwareFma::apply(factor, values.w, sum.w);
      }
      store_16(c + 4 * i, uint4{bit_cast<uint32_t>(sum.x), bit_cast<uint32_t>(sum.y), bit_cast<uint32_t>(sum.z),
                                bit_cast<uint32_t>(sum.w)});
    }
  }
};

}  // namespace adazeta
