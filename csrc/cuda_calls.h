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
  const FillNormalParams params = fill_normal_params(out, numel, dtype, seed, offset, distribution);
  raise_on_error(cuda_fill_normal(params, stream(where)), "fill_normal_", where);
}

// `table` is a device address, null when cuda_perturb_table_bytes is 0 for the tensors that are not empty.
inline void perturb(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& numels,
                    const std::vector<int>& dtypes, uintptr_t seeds, uintptr_t scales, int64_t seed_count,
                    uint64_t offset, float decay, int distribution, uintptr_t table, Where where) {
  const TensorList list = checked_tensors(pointers, numels, dtypes, offset);
  const PerturbParams params = perturb_params(list, seeds, scales, seed_count, offset, decay, distribution);
  raise_on_error(cuda_perturb(params, pointer<const void>(table), stream(where)), "perturb_", where);
}

inline void write_perturb_table(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& numels,
                                const std::vector<int>& dtypes, uintptr_t seeds, uintptr_t scales, int64_t seed_count,
                                uintptr_t host) {
  const TensorList list = checked_tensors(pointers, numels, dtypes, 0);
  cuda_write_perturb_table(perturb_params(list, seeds, scales, seed_count, 0, 1.0f, 0), pointer<void>(host));
}

inline void perturb_rows(uintptr_t theta, uintptr_t out, int64_t rows, int64_t numel, uintptr_t seeds, uintptr_t scales,
                         uint64_t offset, int distribution, Where where) {
  const PerturbRowsParams params = perturb_rows_params(theta, out, rows, numel, seeds, scales, offset, distribution);
  raise_on_error(cuda_perturb_rows(params, stream(where)), "perturb_rows", where);
}

// 0, or the floats of device memory that every adapter and probe needs.
inline int64_t tt_factors_scratch(const std::vector<int64_t>& layout, Where where) {
  int64_t floats = 0;
  raise_on_error(cuda_tt_factors_scratch(checked_layout(layout), stream(where), &floats), "tt_factors", where);
  return floats;
}

inline void tt_factors(uintptr_t theta, uintptr_t out, const std::vector<int64_t>& layout, int64_t adapters,
                       uintptr_t seeds, uintptr_t scales, int64_t probes, uint64_t offset, int distribution,
                       uintptr_t scratch, Where where) {
  const TTFactorsParams params =
      tt_factors_params(theta, out, layout, adapters, seeds, scales, probes, offset, distribution);
  raise_on_error(cuda_tt_factors(params, pointer<float>(scratch), stream(where)), "tt_factors", where);
}

// 0, or the floats of device memory that a call needs.
inline int64_t tt_adapter_scratch(int64_t probes, int64_t tokens, const std::vector<int64_t>& layout, Where where) {
  const TTAdapterParams params = tt_adapter_params(0, 0, 0, probes, tokens, layout, 0, 0, 0, 1.0f);
  int64_t floats = 0;
  raise_on_error(cuda_tt_adapter_scratch(params, stream(where), &floats), "tt_adapter", where);
  return floats;
}

inline void tt_adapter(uintptr_t x, uintptr_t y, int dtype, int64_t probes, int64_t tokens,
                       const std::vector<int64_t>& layout, uintptr_t factors, int64_t factor_stride, int act,
                       float scale, uintptr_t scratch, Where where) {
  const TTAdapterParams params =
      tt_adapter_params(x, y, dtype, probes, tokens, layout, factors, factor_stride, act, scale);
  raise_on_error(cuda_tt_adapter(params, pointer<float>(scratch), stream(where)), "tt_adapter", where);
}

inline void tt_adapter_from_cores(uintptr_t x, uintptr_t y, int dtype, int64_t probes, int64_t tokens,
                                  const std::vector<int64_t>& layout, uintptr_t theta, uintptr_t seeds,
                                  uintptr_t scales, uint64_t offset, int distribution, int act, float scale,
                                  Where where) {
  const TTAdapterParams params = tt_adapter_params(x, y, dtype, probes, tokens, layout, 0, 0, act, scale);
  const TTFactorsParams cores = tt_factors_params(theta, 0, layout, 1, seeds, scales, probes, offset, distribution);
  raise_on_error(cuda_tt_adapter_from_cores(params, cores, stream(where)), "tt_adapter_from_cores", where);
}

// tt_linear (base 0, scale 1) and low_rank_linear (bias 0).
inline void low_rank(uintptr_t x, uintptr_t base, uintptr_t y, int dtype, int64_t probes, int64_t tokens, int64_t d_in,
                     int64_t d_out, int64_t rank, uintptr_t left, int64_t left_stride, uintptr_t right,
                     int64_t right_stride, uintptr_t bias, int64_t bias_stride, float scale, Where where) {
  const LowRankParams params = low_rank_params(x, base, y, dtype, probes, tokens, d_in, d_out, rank, left, left_stride,
                                               right, right_stride, bias, bias_stride, scale);
  raise_on_error(cuda_low_rank(params, stream(where)), "low_rank", where);
}

}  // namespace cuda
}  // namespace adazeta
