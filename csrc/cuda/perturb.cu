// perturb_ on a GPU: theta <- decay theta + sum_j scales[j] z(seeds[j]), one launch for any list of tensors and seeds.
#include <cstring>

#include "cuda/group.h"
#include "cuda/launch.h"

namespace adazeta {
namespace {

struct PerturbArguments {
  // On the device; null where the lists below hold them.
  const TensorRef* tensors;
  const uint64_t* seeds;
  const float* scales;
  int64_t tensor_count, seed_count, numel, groups;
  uint64_t offset;
  float decay;
  TensorRef inline_tensors[kInlineTensors];
  uint64_t inline_seeds[kInlineSeeds];
  float inline_scales[kInlineSeeds];
};
static_assert(sizeof(PerturbArguments) <= 4096, "kernel parameters end at 4 KB");

// The last tensor that begins at or before `position`.
__device__ __forceinline__ int64_t find_tensor(const TensorRef* tensors, int64_t count, int64_t position) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (tensors[middle].begin <= position ? low : high) = middle;
  }
  return low;
}

// Calls visit(tensor, element in it, i) for each of the group's elements that exists; the first is in tensor t.
template <class Visit>
__device__ __forceinline__ void for_elements(const TensorRef* tensors, int64_t count, int64_t numel, int64_t position,
                                             int64_t t, Visit visit) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const int64_t at = position + i;
    if (at >= 0 && at < numel) {
      while (t + 1 < count && tensors[t + 1].begin <= at) ++t;
      visit(tensors[t], at - tensors[t].begin, i);
    }
  }
}

template <Distribution kDistribution>
__global__ void __launch_bounds__(kThreads, 4) perturb_kernel(const __grid_constant__ PerturbArguments p) {
  const TensorRef* tensors = p.tensors != nullptr ? p.tensors : p.inline_tensors;
  const uint64_t* seeds = p.seeds != nullptr ? p.seeds : p.inline_seeds;
  const float* scales = p.scales != nullptr ? p.scales : p.inline_scales;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < p.groups; g += stride) {
    const uint64_t base = (p.offset / kGroup + static_cast<uint64_t>(g)) * kGroup;
    const int64_t position = static_cast<int64_t>(base - p.offset);  // in the concatenation; negative in a cut group
    const int64_t t = find_tensor(tensors, p.tensor_count, position < 0 ? 0 : position);
    const TensorRef tensor = tensors[t];
    const int64_t end = t + 1 < p.tensor_count ? tensors[t + 1].begin : p.numel, at = position - tensor.begin;
    const bool whole = at >= 0 && position + kGroup <= end && aligned_16(tensor.data, tensor.dtype, at);
    float acc[kGroup] = {};
    if (whole) {
      load_group(tensor.data, tensor.dtype, at, acc);
    } else {
      for_elements(tensors, p.tensor_count, p.numel, position, t,
                   [&](const TensorRef& from, int64_t e, int i) { acc[i] = load_element(from.data, from.dtype, e); });
    }
    if (p.decay != 1.0f) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) acc[i] *= p.decay;
    }
    for (int64_t j = 0; j < p.seed_count; ++j) add_direction_group<kDistribution>(seeds[j], scales[j], base, acc);
    if (whole) {
      store_group(tensor.data, tensor.dtype, at, acc);
    } else {
      for_elements(tensors, p.tensor_count, p.numel, position, t,
                   [&](const TensorRef& to, int64_t e, int i) { store_element(to.data, to.dtype, e, acc[i]); });
    }
  }
}

}  // namespace

size_t cuda_perturb_table_bytes(int64_t tensors, int64_t seeds) {
  if (tensors <= kInlineTensors && seeds <= kInlineSeeds) return 0;
  return tensors * sizeof(TensorRef) + seeds * (sizeof(uint64_t) + sizeof(float));
}

void cuda_write_perturb_table(const PerturbParams& p, void* host) {
  char* to = static_cast<char*>(host);
  memcpy(to, p.tensors, p.tensor_count * sizeof(TensorRef));
  to += p.tensor_count * sizeof(TensorRef);
  memcpy(to, p.seeds, p.seed_count * sizeof(uint64_t));
  to += p.seed_count * sizeof(uint64_t);
  memcpy(to, p.scales, p.seed_count * sizeof(float));
}

int cuda_perturb(const PerturbParams& p, const void* table, CudaStream where) {
  if (p.numel == 0) return cudaSuccess;
  const bool listed = cuda_perturb_table_bytes(p.tensor_count, p.seed_count) == 0;
  if (!listed && table == nullptr) return cudaErrorInvalidValue;
  const DeviceGuard guard(where.device);
  if (guard.error() != cudaSuccess) return guard.error();
  PerturbArguments arguments{};
  arguments.tensor_count = p.tensor_count;
  arguments.seed_count = p.seed_count;
  arguments.numel = p.numel;
  arguments.groups = group_count(p.offset, p.numel);
  arguments.offset = p.offset;
  arguments.decay = p.decay;
  if (listed) {
    memcpy(arguments.inline_tensors, p.tensors, p.tensor_count * sizeof(TensorRef));
    for (int64_t j = 0; j < p.seed_count; ++j) {
      arguments.inline_seeds[j] = p.seeds[j];
      arguments.inline_scales[j] = p.scales[j];
    }
  } else {
    arguments.tensors = static_cast<const TensorRef*>(table);
    arguments.seeds = reinterpret_cast<const uint64_t*>(arguments.tensors + p.tensor_count);
    arguments.scales = reinterpret_cast<const float*>(arguments.seeds + p.seed_count);
  }
  unsigned blocks = 0;
  const cudaError_t error = grid_size(where.device, (arguments.groups + kThreads - 1) / kThreads, &blocks);
  if (error != cudaSuccess) return error;
  const auto kernel = p.distribution == Distribution::kGaussian ? &perturb_kernel<Distribution::kGaussian>
                                                                : &perturb_kernel<Distribution::kRademacher>;
  return launch(kernel, blocks, 0, where, arguments);
}

}  // namespace adazeta
