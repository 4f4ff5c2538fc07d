// Launching a kernel on the caller's device and stream. tests/kernels/shim runs the same kernels on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ops.h"

#if defined(ADAZETA_CUDA_SHIM)
#define ADAZETA_DYNAMIC_SHARED(name) float* const name = shim::dynamic_shared()
#else
#define ADAZETA_DYNAMIC_SHARED(name) extern __shared__ __align__(16) float name[]
#endif

namespace adazeta {

constexpr int kThreads = 256;
// A block gets 48 KiB of shared memory, and more only after asking for it; arrays that a kernel declares are part of
// it.
constexpr size_t kDeclaredSharedBytes = 8 << 10;  // the most that a kernel declares
constexpr size_t kDefaultSharedBytes = (48 << 10) - kDeclaredSharedBytes;

// Makes a device current, and the former one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&former_);
    if (error_ == cudaSuccess && former_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int former_ = 0;
  bool changed_ = false;
};

// Blocks for `tiles` of work: no more than the device runs at once, the kernel loops over the rest.
inline cudaError_t grid_size(int device, int64_t tiles, unsigned* blocks) {
  int processors = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t most = int64_t{8} * processors;  // 2048 threads of a multiprocessor
  *blocks = static_cast<unsigned>(tiles < most ? tiles : most);
  return error;
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, size_t shared_bytes, CudaStream where, const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
#if defined(ADAZETA_CUDA_SHIM)
  (void)where;
  return shim::run(function, grid, kThreads, shared_bytes, [&] { kernel(params); });
#else
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))};
  return cudaLaunchKernel(function, grid, dim3(kThreads), arguments, shared_bytes,
                          static_cast<cudaStream_t>(where.stream));
#endif
}

}  // namespace adazeta
