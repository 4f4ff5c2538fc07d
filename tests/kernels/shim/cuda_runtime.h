// Stands in for the CUDA runtime's header, so that csrc/cuda/*.cu compile as C++ and their kernels run on the CPU.
//
// One block runs after another; the threads of a block are fibers that run one after another between barriers
// (__syncthreads, and the warp shuffles, which all 32 lanes must reach). Odd blocks run their threads backwards, and
// dynamic shared memory is NaN at the start of each block: a missing barrier or initialisation shows in the results.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __CUDA_ARCH_LIST__ 800, 900
#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern dim3 threadIdx, blockIdx, gridDim, blockDim;

// Two processors: with few blocks, the loops over what is left run too. Calls count as device 0 only.
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value);
const char* cudaGetErrorString(cudaError_t error);

void __syncthreads();
float __shfl_xor_sync(unsigned mask, float value, int lane_mask);
inline void __stcs(uint4* address, uint4 value) { *address = value; }
inline float __ldg(const float* address) { return *address; }

namespace shim {

float* dynamic_shared();
// cudaErrorLaunchFailure when threads of a block wait for each other at different barriers; cudaErrorInvalidValue when
// the kernel `function` takes more shared memory than a block has or was asked for.
cudaError_t run(const void* function, dim3 grid, unsigned threads, size_t shared_bytes,
                const std::function<void()>& kernel);

}  // namespace shim
