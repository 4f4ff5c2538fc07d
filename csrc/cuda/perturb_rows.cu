// perturb_rows on a GPU: row p of out is theta + scales[p] z(seeds[p]), the same bits that perturb_ would write.
#include "cuda/group.h"
#include "cuda/launch.h"

namespace adazeta {
namespace {

struct PerturbRowsArguments {
  const float* theta;
  float* out;
  int64_t numel, groups;
  uint64_t offset;
  uint64_t seeds[kLaunchProbes];
  float scales[kLaunchProbes];
};
static_assert(sizeof(PerturbRowsArguments) <= 4096, "kernel parameters end at 4 KB");

// One row per blockIdx.y.
template <Distribution kDistribution>
__global__ void __launch_bounds__(kThreads) perturb_rows_kernel(const __grid_constant__ PerturbRowsArguments p) {
  const uint64_t seed = p.seeds[blockIdx.y];
  const float scale = p.scales[blockIdx.y];
  float* out = p.out + static_cast<int64_t>(blockIdx.y) * p.numel;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < p.groups; g += stride) {
    const uint64_t base = (p.offset / kGroup + static_cast<uint64_t>(g)) * kGroup;
    const int64_t at = static_cast<int64_t>(base - p.offset);
    float acc[kGroup];
    load_group_within(p.theta, Dtype::kFloat32, at, p.numel, acc);
    add_direction_group<kDistribution>(seed, scale, base, acc);
    store_group_within(out, Dtype::kFloat32, at, p.numel, acc);
  }
}

}  // namespace

int cuda_perturb_rows(const PerturbRowsParams& p, CudaStream where) {
  if (p.numel == 0 || p.rows == 0) return cudaSuccess;
  const DeviceGuard guard(where.device);
  if (guard.error() != cudaSuccess) return guard.error();
  PerturbRowsArguments arguments{};
  arguments.theta = p.theta;
  arguments.numel = p.numel;
  arguments.groups = group_count(p.offset, p.numel);
  arguments.offset = p.offset;
  unsigned blocks = 0;
  cudaError_t error = grid_size(where.device, (arguments.groups + kThreads - 1) / kThreads, &blocks);
  const auto kernel = p.distribution == Distribution::kGaussian ? &perturb_rows_kernel<Distribution::kGaussian>
                                                                : &perturb_rows_kernel<Distribution::kRademacher>;
  for (int64_t first = 0; first < p.rows && error == cudaSuccess; first += kLaunchProbes) {
    const int64_t rows = p.rows - first < kLaunchProbes ? p.rows - first : kLaunchProbes;
    arguments.out = p.out + first * p.numel;
    for (int64_t i = 0; i < rows; ++i) {
      arguments.seeds[i] = p.seeds[first + i];
      arguments.scales[i] = p.scales[first + i];
    }
    error = launch(kernel, dim3(blocks, static_cast<unsigned>(rows)), 0, where, arguments);
  }
  return error;
}

}  // namespace adazeta
