// The ops on a GPU with Python's arguments; error codes become exceptions. Included by bindings.cpp alone.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "checked.h"
#include "cuda/ops.h"

namespace adazeta {
namespace cuda {

using Where = std::pair<int, uintptr_t>;  // index of the device, address of the stream

inline CudaStream stream(Where where) { return {where.first, pointer<void>(where.second)}; }

inline void raise_on_error(int code, const char* op, Where where) {
  if (code == 0) return;
  throw std::runtime_error(std::string(op) + " on CUDA device " + std::to_string(where.first) + ": " +
                           cuda_error_text(code) + " (cudaError " + std::to_string(code) + ")");
}

inline void fill_normal(uintptr_t out, int64_t numel, int dtype, uint64_t seed, uint64_t offset, int distribution,
                        Where where) {
  check_size(numel, offset);
  const FillNormalParams params{
      {pointer<void>(out), 0, checked_dtype(dtype)}, numel, offset, seed, checked_distribution(distribution), 0};
  raise_on_error(cuda_fill_normal(params, stream(where)), "fill_normal_", where);
}

inline PerturbParams perturb_params(const std::vector<TensorRef>& tensors, int64_t numel, uintptr_t seeds,
                                    uintptr_t scales, int64_t seed_count) {
  PerturbParams params{};
  params.tensors = tensors.data();
  params.tensor_count = static_cast<int64_t>(tensors.size());
  params.numel = numel;
  params.seeds = pointer<const uint64_t>(seeds);
  params.scales = pointer<const float>(scales);
  params.seed_count = seed_count;
  return params;
}

// `table` is a device address, null when cuda_perturb_table_bytes is 0 for the tensors that are not empty.
inline void perturb(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& numels,
                    const std::vector<int>& dtypes, uintptr_t seeds, uintptr_t scales, int64_t seed_count,
                    uint64_t offset, float decay, int distribution, uintptr_t table, Where where) {
  int64_t numel = 0;
  const std::vector<TensorRef> tensors = checked_tensors(pointers, numels, dtypes, offset, &numel);
  PerturbParams params = perturb_params(tensors, numel, seeds, scales, seed_count);
  params.offset = offset;
  params.decay = decay;
  params.distribution = checked_distribution(distribution);
  raise_on_error(cuda_perturb(params, pointer<const void>(table), stream(where)), "perturb_", where);
}

inline void write_perturb_table(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& numels,
                                const std::vector<int>& dtypes, uintptr_t seeds, uintptr_t scales, int64_t seed_count,
                                uintptr_t host) {
  int64_t numel = 0;
  const std::vector<TensorRef> tensors = checked_tensors(pointers, numels, dtypes, 0, &numel);
  cuda_write_perturb_table(perturb_params(tensors, numel, seeds, scales, seed_count), pointer<void>(host));
}

inline void perturb_rows(uintptr_t theta, uintptr_t out, int64_t rows, int64_t numel, uintptr_t seeds, uintptr_t scales,
                         uint64_t offset, int distribution, Where where) {
  check_size(numel, offset);
  const PerturbRowsParams params{pointer<const float>(theta),
                                 pointer<float>(out),
                                 rows,
                                 numel,
                                 offset,
                                 pointer<const uint64_t>(seeds),
                                 pointer<const float>(scales),
                                 checked_distribution(distribution),
                                 0};
  raise_on_error(cuda_perturb_rows(params, stream(where)), "perturb_rows", where);
}

}  // namespace cuda
}  // namespace adazeta
