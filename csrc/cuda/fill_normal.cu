// fill_normal_ on a GPU: out[i] <- element offset + i of the direction of one seed.
#include "cuda/group.h"
#include "cuda/launch.h"

namespace adazeta {
namespace {

struct FillNormalArguments {
  void* out;
  Dtype dtype;
  int64_t numel, groups;
  uint64_t offset, seed;
};

template <Distribution kDistribution>
__global__ void __launch_bounds__(kThreads) fill_normal_kernel(const __grid_constant__ FillNormalArguments p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < p.groups; g += stride) {
    const uint64_t base = (p.offset / kGroup + static_cast<uint64_t>(g)) * kGroup;
    float z[kGroup];
    direction_group<kDistribution>(p.seed, base, z);
    store_group_within(p.out, p.dtype, static_cast<int64_t>(base - p.offset), p.numel, z);
  }
}

}  // namespace

int cuda_fill_normal(const FillNormalParams& p, CudaStream where) {
  if (p.numel == 0) return cudaSuccess;
  const DeviceGuard guard(where.device);
  if (guard.error() != cudaSuccess) return guard.error();
  const FillNormalArguments arguments{p.out.data, p.out.dtype, p.numel, group_count(p.offset, p.numel),
                                      p.offset,   p.seed};
  unsigned blocks = 0;
  const cudaError_t error = grid_size(where.device, (arguments.groups + kThreads - 1) / kThreads, &blocks);
  if (error != cudaSuccess) return error;
  const auto kernel = p.distribution == Distribution::kGaussian ? &fill_normal_kernel<Distribution::kGaussian>
                                                                : &fill_normal_kernel<Distribution::kRademacher>;
  return launch(kernel, blocks, 0, where, arguments);
}

}  // namespace adazeta
