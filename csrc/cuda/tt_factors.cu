// tt_factors on a GPU: the contracted cores of theta + scales[p] z(seeds[p]), all adapters and probes in one launch. A
// block perturbs the cores of one adapter at one probe into shared memory and contracts them there.
#include "cuda/cores.h"

namespace adazeta {
namespace {

struct TTFactorsArguments {
  const float* theta;
  float* out;
  float* scratch;         // for every block; null: shared memory
  int64_t scratch_block;  // floats from one block to the next
  int64_t adapter_out;    // floats from one adapter's factors to the next
  uint64_t offset;
  TTLayout layout;
  uint64_t seeds[kLaunchProbes];
  float scales[kLaunchProbes];
};
static_assert(sizeof(TTFactorsArguments) <= 4096, "kernel parameters end at 4 KB");

// blockIdx.x: adapter, blockIdx.y: probe.
template <Distribution kDistribution>
__global__ void __launch_bounds__(kThreads, 4) tt_factors_kernel(const __grid_constant__ TTFactorsArguments p) {
  ADAZETA_DYNAMIC_SHARED(shared);
  const int64_t block = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
  float* moved = p.scratch == nullptr ? shared : p.scratch + block * p.scratch_block;
  const int64_t numel = theta_numel(p.layout);
  const float* theta = p.theta + blockIdx.x * numel;
  const uint64_t offset = p.offset + static_cast<uint64_t>(blockIdx.x * numel);
  perturb_cores<kDistribution>(theta, numel, offset, p.seeds[blockIdx.y], p.scales[blockIdx.y], moved);
  float* out = p.out + blockIdx.x * p.adapter_out + blockIdx.y * factor_numel(p.layout);
  contract_adapter(p.layout, moved, moved + rounded_up_4(numel), out, BlockOps{});
}

int64_t block_floats(const TTLayout& layout) {
  const FactorsScratch products = factors_scratch(layout);
  return rounded_up_4(theta_numel(layout)) + products.halves * products.half;
}

}  // namespace

int cuda_tt_factors_scratch(const TTLayout& layout, CudaStream where, int64_t* floats) {
  int limit = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, where.device);
  const int64_t needed = block_floats(layout);
  *floats = needed * static_cast<int64_t>(sizeof(float)) <= limit ? 0 : needed;
  return error;
}

int cuda_tt_factors(const TTFactorsParams& p, float* scratch, CudaStream where) {
  if (p.probes == 0 || p.adapters == 0) return cudaSuccess;
  const DeviceGuard guard(where.device);
  if (guard.error() != cudaSuccess) return guard.error();
  const int64_t factors = factor_numel(p.layout);
  TTFactorsArguments arguments{};
  arguments.theta = p.theta;
  arguments.scratch = scratch;
  arguments.scratch_block = block_floats(p.layout);
  arguments.adapter_out = p.probes * factors;
  arguments.offset = p.offset;
  arguments.layout = p.layout;
  const size_t shared_bytes = scratch == nullptr ? sizeof(float) * arguments.scratch_block : 0;
  const auto kernel = p.distribution == Distribution::kGaussian ? &tt_factors_kernel<Distribution::kGaussian>
                                                                : &tt_factors_kernel<Distribution::kRademacher>;
  cudaError_t error = cudaSuccess;
  for (int64_t first = 0; first < p.probes && error == cudaSuccess; first += kLaunchProbes) {
    const int64_t probes = p.probes - first < kLaunchProbes ? p.probes - first : kLaunchProbes;
    arguments.out = p.out + first * factors;
    for (int64_t i = 0; i < probes; ++i) {
      arguments.seeds[i] = p.seeds[first + i];
      arguments.scales[i] = p.scales[first + i];
    }
    const dim3 grid(static_cast<unsigned>(p.adapters), static_cast<unsigned>(probes));
    error = launch(kernel, grid, shared_bytes, where, arguments);
  }
  return error;
}

}  // namespace adazeta
