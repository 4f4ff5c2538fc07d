// The ops on a GPU, as csrc/bindings.cpp calls them. No CUDA header is needed to include this.
//
// Every function launches on the caller's stream and returns at once: no synchronisation, no allocation, so a call can
// be captured in a CUDA graph. Data pointers are device addresses; seeds and scales are host ones and are copied into
// the launch. The result is a cudaError_t, 0 being success; nothing is printed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adazeta/params.h"

namespace adazeta {

struct CudaStream {
  int device;
  void* stream;
};

const char* cuda_error_text(int code);

int cuda_fill_normal(const FillNormalParams& p, CudaStream where);

// Lists of at most this many tensors and seeds travel with the launch; longer ones in a table on the device.
constexpr int64_t kInlineTensors = 112;
constexpr int64_t kInlineSeeds = 64;
// Bytes of the table; 0 when none is needed.
size_t cuda_perturb_table_bytes(int64_t tensors, int64_t seeds);
void cuda_write_perturb_table(const PerturbParams& p, void* host);
// `table`: device address of what cuda_write_perturb_table wrote, or null.
int cuda_perturb(const PerturbParams& p, const void* table, CudaStream where);

// Rows and probes beyond this many go into a launch of their own.
constexpr int64_t kLaunchProbes = 256;
int cuda_perturb_rows(const PerturbRowsParams& p, CudaStream where);

// Stores how many floats of device memory a block needs; 0 where its shared memory is enough.
int cuda_tt_factors_scratch(const TTLayout& layout, CudaStream where, int64_t* floats);
// `scratch` holds adapters * probes times what a block needs, or is null.
int cuda_tt_factors(const TTFactorsParams& p, float* scratch, CudaStream where);

// Stores how many floats of device memory a call needs: some where few tokens are split over d, else 0.
int cuda_tt_adapter_scratch(const TTAdapterParams& p, CudaStream where, int64_t* floats);
int cuda_tt_adapter(const TTAdapterParams& p, float* scratch, CudaStream where);
// tt_factors and tt_adapter in one launch, no factor touches memory. `cores` tells theta, layout, seeds and scales, one
// for each of p's probes. cudaErrorInvalidValue where the last input core of the map down, or what is behind the first
// output core of the map up, is no multiple of 8 wide, or either is the only one; or where x is not aligned to 16
// bytes.
int cuda_tt_adapter_from_cores(const TTAdapterParams& p, const TTFactorsParams& cores, CudaStream where);
// tt_linear and low_rank_linear.
int cuda_low_rank(const LowRankParams& p, CudaStream where);

}  // namespace adazeta
