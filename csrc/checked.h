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

// Tensors that are not empty, and where each begins in the concatenation, which has *numel elements.
inline std::vector<TensorRef> checked_tensors(const std::vector<uintptr_t>& pointers,
                                              const std::vector<int64_t>& numels, const std::vector<int>& dtypes,
                                              uint64_t offset, int64_t* numel) {
  if (pointers.size() != numels.size() || pointers.size() != dtypes.size()) {
    throw std::invalid_argument("expected pointers, numels and dtypes of one length");
  }
  std::vector<TensorRef> tensors;
  tensors.reserve(pointers.size());
  *numel = 0;
  for (size_t i = 0; i < pointers.size(); ++i) {
    check_size(numels[i], offset + static_cast<uint64_t>(*numel));
    if (numels[i] > 0) tensors.push_back({pointer<void>(pointers[i]), *numel, checked_dtype(dtypes[i])});
    *numel += numels[i];
  }
  return tensors;
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

}  // namespace adazeta
