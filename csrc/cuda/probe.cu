// The device query behind adazeta_kernels.backends(), asked for, never run at import; and the text of an error.
#include "probe.h"

#include <cuda_runtime.h>

#include "cuda/ops.h"

namespace adazeta {

const char* cuda_device_count(int* count) {
  const cudaError_t status = cudaGetDeviceCount(count);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

const char* cuda_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace adazeta
