// Arguments of the ops as plain structs: raw pointers and sizes, no tensor type.
#pragma once

#include <cstdint>

namespace adazeta {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Distribution : int32_t { kGaussian = 0, kRademacher = 1 };

// One contiguous tensor of a list; `begin` is the position of its first element in the concatenation of the list.
struct TensorRef {
  void* data;
  int64_t begin;
  Dtype dtype;
};

// Element i of the concatenation has index offset + i in every direction.
struct FillNormalParams {
  TensorRef out;
  int64_t numel;
  uint64_t offset;
  uint64_t seed;
  Distribution distribution;
  int32_t threads;
};

// theta <- decay theta + sum_j scales[j] z(seeds[j]) over all tensors.
struct PerturbParams {
  const TensorRef* tensors;  // ascending `begin`, none empty
  int64_t tensor_count;
  int64_t numel;
  uint64_t offset;
  const uint64_t* seeds;
  const float* scales;
  int64_t seed_count;
  float decay;
  Distribution distribution;
  int32_t threads;
};

// out[p] = theta + scales[p] z(seeds[p]), out [rows, numel], theta [numel].
struct PerturbRowsParams {
  const float* theta;
  float* out;
  int64_t rows;
  int64_t numel;
  uint64_t offset;
  const uint64_t* seeds;
  const float* scales;
  Distribution distribution;
  int32_t threads;
};

}  // namespace adazeta
