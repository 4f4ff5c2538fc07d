// The device queries behind adazeta_kernels.backends(), asked for, never run at import; and the text of an error.
#include "probe.h"

#include <cuda_runtime.h>

#include "cuda/ops.h"

namespace adazeta {

const char* cuda_device_count(int* count) {
  const cudaError_t status = cudaGetDeviceCount(count);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

int cuda_lowest_capability() {
#if defined(__CUDA_ARCH_LIST__)
  constexpr int kBuiltFor[] = {__CUDA_ARCH_LIST__};  // ascending, 800 for 8.0
  return kBuiltFor[0] / 10;
#else
  return 0;
#endif
}

const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace adazeta
