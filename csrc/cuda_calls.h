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

// 0, or the floats of device memory that every adapter and probe needs.
inline int64_t tt_factors_scratch(const std::vector<int64_t>& layout, Where where) {
  int64_t floats = 0;
  raise_on_error(cuda_tt_factors_scratch(checked_layout(layout), stream(where), &floats), "tt_factors", where);
  return floats;
}

inline void tt_factors(uintptr_t theta, uintptr_t out, const std::vector<int64_t>& layout, int64_t adapters,
                       uintptr_t seeds, uintptr_t scales, int64_t probes, uint64_t offset, int distribution,
                       uintptr_t scratch, Where where) {
  TTFactorsParams params{};
  params.theta = pointer<const float>(theta);
  params.out = pointer<float>(out);
  params.layout = checked_layout(layout);
  params.seeds = pointer<const uint64_t>(seeds);
  params.scales = pointer<const float>(scales);
  params.probes = probes;
  params.offset = offset;
  params.distribution = checked_distribution(distribution);
  if (adapters < 1 || adapters > 65535) throw std::invalid_argument("expected 1 to 65535 adapters");
  check_size(adapters * theta_numel(params.layout), offset);
  raise_on_error(cuda_tt_factors(params, adapters, pointer<float>(scratch), stream(where)), "tt_factors", where);
}

inline void tt_adapter(uintptr_t x, uintptr_t y, int dtype, int64_t probes, int64_t tokens,
                       const std::vector<int64_t>& layout, uintptr_t factors, int64_t factor_stride, int act,
                       float scale, Where where) {
  const TTLayout shape = checked_layout(layout);
  TTAdapterParams params{};
  params.x = {pointer<void>(x), checked_dtype(dtype)};
  params.y = {pointer<void>(y), checked_dtype(dtype)};
  params.probes = probes;
  params.tokens = tokens;
  params.width = d_in(shape.down);
  params.bottleneck = checked_bottleneck(d_out(shape.down));
  params.rank_down = checked_rank(bond(shape.down));
  params.rank_up = checked_rank(bond(shape.up));
  params.bias = shape.bias;
  params.factors = pointer<const float>(factors);
  params.factor_stride = factor_stride;
  params.act = checked_act(act);
  params.scale = scale;
  raise_on_error(cuda_tt_adapter(params, stream(where)), "tt_adapter", where);
}

// tt_linear (base 0, scale 1) and low_rank_linear (bias 0).
inline void low_rank(uintptr_t x, uintptr_t base, uintptr_t y, int dtype, int64_t probes, int64_t tokens, int64_t d_in,
                     int64_t d_out, int64_t rank, uintptr_t left, int64_t left_stride, uintptr_t right,
                     int64_t right_stride, uintptr_t bias, int64_t bias_stride, float scale, Where where) {
  const Dtype type = checked_dtype(dtype);
  LowRankParams params{};
  params.x = {pointer<void>(x), type};
  params.base = {pointer<void>(base), type};
  params.y = {pointer<void>(y), type};
  params.probes = probes;
  params.tokens = tokens;
  params.d_in = d_in;
  params.d_out = d_out;
  params.rank = checked_rank(rank);
  params.left = pointer<const float>(left);
  params.left_stride = left_stride;
  params.right = pointer<const float>(right);
  params.right_stride = right_stride;
  params.bias = pointer<const float>(bias);
  params.bias_stride = bias_stride;
  params.scale = scale;
  raise_on_error(cuda_low_rank(params, stream(where)), "low_rank", where);
}

}  // namespace cuda
}  // namespace adazeta
