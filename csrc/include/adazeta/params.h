// Arguments of the ops as plain structs: raw pointers and sizes, no tensor type.
#pragma once

#include <cstdint>

namespace adazeta {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

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

enum class Act : int32_t { kRelu = 0, kGelu = 1, kSilu = 2, kTanh = 3, kIdentity = 4 };

// Limits of the TT ops; beyond them adazeta_kernels/backends/native.py names another backend.
constexpr int kMaxCores = 16;  // of one map
constexpr int kMaxRank = 64;   // of the bond between L and R
constexpr int kMaxBottleneck = 1024;

// A map W = L R: cores of the input dimensions, then of the output dimensions; ranks 1 at both ends.
struct TTMap {
  int32_t in_count, out_count;
  int32_t dims[kMaxCores];
  int32_t ranks[kMaxCores + 1];
};

// x + up(act(down(x))): cores of down, its bias, cores of up, its bias, in this order in theta.
struct TTLayout {
  TTMap down, up;
  bool bias;
};

// out[a, p] = the factors of adapter a of theta + scales[p] z(seeds[p]), element i of theta having index offset + i.
struct TTFactorsParams {
  const float* theta;  // [adapters, theta_numel]
  float* out;          // [adapters, probes, factor_numel]
  TTLayout layout;
  int64_t adapters;
  const uint64_t* seeds;
  const float* scales;
  int64_t probes;
  uint64_t offset;
  Distribution distribution;
  int32_t threads;
};

// Activations [probes, tokens, width], contiguous; `data` may be null where a struct below says so.
struct Tokens {
  void* data;
  Dtype dtype;
};

// y = x + scale ((act((x L1) R1 + b1) L2) R2 + b2), factors as TTFactorsParams writes them.
struct TTAdapterParams {
  Tokens x, y;
  int64_t probes, tokens, width;
  int32_t bottleneck, rank_down, rank_up;
  bool bias;
  const float* factors;
  int64_t factor_stride;  // numbers from one probe to the next
  Act act;
  float scale;
  int32_t threads;
};

// y = base + scale ((x L) R + bias); base and bias may be null.
struct LowRankParams {
  Tokens x, base, y;
  int64_t probes, tokens, d_in, d_out;
  int32_t rank;
  const float *left, *right, *bias;
  int64_t left_stride, right_stride, bias_stride;  // numbers from one probe to the next
  float scale;
  int32_t threads;
};

}  // namespace adazeta
