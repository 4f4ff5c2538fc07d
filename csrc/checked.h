// From what Python passes to what the ops take: codes to enums, lists to structs. std::invalid_argument is a
// ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "adazeta/params.h"
#include "adazeta/tt.h"

namespace adazeta {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline Dtype checked_dtype(int code) {
  if (code < 0 || code > static_cast<int>(Dtype::kFloat16)) {
    throw std::invalid_argument("expected a dtype code of 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                                std::to_string(code));
  }
  return static_cast<Dtype>(code);
}

inline Distribution checked_distribution(int code) {
  if (code < 0 || code > static_cast<int>(Distribution::kRademacher)) {
    throw std::invalid_argument("expected a distribution code of 0 (gaussian) or 1 (rademacher), got " +
                                std::to_string(code));
  }
  return static_cast<Distribution>(code);
}

inline void check_size(int64_t numel, uint64_t offset) {
  if (numel < 0 || offset > (uint64_t{1} << 63) - static_cast<uint64_t>(numel)) {
    throw std::invalid_argument("expected indices below 2^63, got offset " + std::to_string(offset) + " and " +
                                std::to_string(numel) + " elements");
  }
}

// Tensors that are not empty, and where each begins in the concatenation, which has `numel` elements.
struct TensorList {
  std::vector<TensorRef> tensors;
  int64_t numel = 0;
  std::vector<int64_t> doubtful;  // places in Python's list of tensors that it has to look at (tensor_list.h)
};

inline TensorList checked_tensors(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& numels,
                                  const std::vector<int>& dtypes, uint64_t offset) {
  if (pointers.size() != numels.size() || pointers.size() != dtypes.size()) {
    throw std::invalid_argument("expected pointers, numels and dtypes of one length");
  }
  TensorList list;
  list.tensors.reserve(pointers.size());
  for (size_t i = 0; i < pointers.size(); ++i) {
    check_size(numels[i], offset + static_cast<uint64_t>(list.numel));
    if (numels[i] > 0) list.tensors.push_back({pointer<void>(pointers[i]), list.numel, checked_dtype(dtypes[i])});
    list.numel += numels[i];
  }
  return list;
}

// Reads what TTAdapterLayout.encode wrote, from the count of input factors of one map on.
inline TTMap checked_map(const std::vector<int64_t>& code, size_t* at) {
  const auto next = [&] {
    if (*at >= code.size()) throw std::invalid_argument("expected an encoded layout, got one that is cut short");
    return code[(*at)++];
  };
  const auto checked = [&](const char* what, int64_t most) {
    const int64_t value = next();
    if (value < 1 || value > most) {
      throw std::invalid_argument(std::string("expected ") + what + " of 1 to " + std::to_string(most) + ", got " +
                                  std::to_string(value));
    }
    return static_cast<int32_t>(value);
  };
  TTMap map{};
  map.in_count = checked("a number of cores", kMaxCores);
  map.out_count = checked("a number of cores", kMaxCores);
  if (core_count(map) > kMaxCores) throw std::invalid_argument("expected at most 16 cores in a map");
  for (int k = 0; k < core_count(map); ++k) map.dims[k] = checked("a dimension", int64_t{1} << 30);
  map.ranks[0] = map.ranks[core_count(map)] = 1;
  for (int k = 1; k < core_count(map); ++k) map.ranks[k] = checked("a rank", int64_t{1} << 20);
  return map;
}

inline TTLayout checked_layout(const std::vector<int64_t>& code) {
  size_t at = 4;  // behind version, width, bottleneck and bias
  TTLayout layout{};
  layout.down = checked_map(code, &at);
  layout.up = checked_map(code, &at);
  layout.bias = code[3] != 0;
  return layout;
}

inline Act checked_act(int code) {
  if (code < 0 || code > static_cast<int>(Act::kIdentity)) {
    throw std::invalid_argument("expected an act code of 0 (relu), 1 (gelu), 2 (silu), 3 (tanh) or 4 (identity), got " +
                                std::to_string(code));
  }
  return static_cast<Act>(code);
}

inline int32_t checked_rank(int64_t rank) {
  if (rank < 1 || rank > kMaxRank) {
    throw std::invalid_argument("expected a rank of 1 to " + std::to_string(kMaxRank) + ", got " +
                                std::to_string(rank));
  }
  return static_cast<int32_t>(rank);
}

inline int32_t checked_bottleneck(int64_t bottleneck) {
  if (bottleneck > kMaxBottleneck) {
    throw std::invalid_argument("expected a bottleneck of at most " + std::to_string(kMaxBottleneck) + ", got " +
                                std::to_string(bottleneck));
  }
  return static_cast<int32_t>(bottleneck);
}

// What an op takes, from Python's arguments, for one thread.
inline FillNormalParams fill_normal_params(uintptr_t out, int64_t numel, int dtype, uint64_t seed, uint64_t offset,
                                           int distribution) {
  check_size(numel, offset);
  return {{pointer<void>(out), 0, checked_dtype(dtype)}, numel, offset, seed, checked_distribution(distribution), 1};
}

// The list has to outlive the result.
inline PerturbParams perturb_params(const TensorList& list, uintptr_t seeds, uintptr_t scales, int64_t seed_count,
                                    uint64_t offset, float decay, int distribution) {
  return {list.tensors.data(),
          static_cast<int64_t>(list.tensors.size()),
          list.numel,
          offset,
          pointer<const uint64_t>(seeds),
          pointer<const float>(scales),
          seed_count,
          decay,
          checked_distribution(distribution),
          1};
}

inline PerturbRowsParams perturb_rows_params(uintptr_t theta, uintptr_t out, int64_t rows, int64_t numel,
                                             uintptr_t seeds, uintptr_t scales, uint64_t offset, int distribution) {
  check_size(numel, offset);
  return {pointer<const float>(theta),
          pointer<float>(out),
          rows,
          numel,
          offset,
          pointer<const uint64_t>(seeds),
          pointer<const float>(scales),
          checked_distribution(distribution),
          1};
}

inline TTFactorsParams tt_factors_params(uintptr_t theta, uintptr_t out, const std::vector<int64_t>& layout,
                                         int64_t adapters, uintptr_t seeds, uintptr_t scales, int64_t probes,
                                         uint64_t offset, int distribution) {
  const TTLayout shape = checked_layout(layout);
  if (adapters < 1) throw std::invalid_argument("expected at least 1 adapter, got " + std::to_string(adapters));
  check_size(adapters * theta_numel(shape), offset);
  return {pointer<const float>(theta),
          pointer<float>(out),
          shape,
          adapters,
          pointer<const uint64_t>(seeds),
          pointer<const float>(scales),
          probes,
          offset,
          checked_distribution(distribution),
          1};
}

inline TTAdapterParams tt_adapter_params(uintptr_t x, uintptr_t y, int dtype, int64_t probes, int64_t tokens,
                                         const std::vector<int64_t>& layout, uintptr_t factors, int64_t factor_stride,
                                         int act, float scale) {
  const TTLayout shape = checked_layout(layout);
  const Dtype type = checked_dtype(dtype);
  return {{pointer<void>(x), type},
          {pointer<void>(y), type},
          probes,
          tokens,
          d_in(shape.down),
          checked_bottleneck(d_out(shape.down)),
          checked_rank(bond(shape.down)),
          checked_rank(bond(shape.up)),
          shape.bias,
          pointer<const float>(factors),
          factor_stride,
          checked_act(act),
          scale,
          1};
}

// tt_linear has base 0 and scale 1, low_rank_linear bias 0.
inline LowRankParams low_rank_params(uintptr_t x, uintptr_t base, uintptr_t y, int dtype, int64_t probes,
                                     int64_t tokens, int64_t d_in, int64_t d_out, int64_t rank, uintptr_t left,
                                     int64_t left_stride, uintptr_t right, int64_t right_stride, uintptr_t bias,
                                     int64_t bias_stride, float scale) {
  const Dtype type = checked_dtype(dtype);
  return {{pointer<void>(x), type},
          {pointer<void>(base), type},
          {pointer<void>(y), type},
          probes,
          tokens,
          d_in,
          d_out,
          checked_rank(rank),
          pointer<const float>(left),
          pointer<const float>(right),
          pointer<const float>(bias),
          left_stride,
          right_stride,
          bias_stride,
          scale,
          1};
}

}  // namespace adazeta
