// The device query behind adazeta_kernels.backends(): asked for, never run at import.
#include "probe.h"

#include <cuda_runtime.h>

namespace adazeta {

const char* cuda_device_count(int* count) {
  const cudaError_t status = cudaGetDeviceCount(count);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace adazeta
