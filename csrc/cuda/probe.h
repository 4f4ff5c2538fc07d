// Whether CUDA was built in and for which devices, and how many the driver offers. No CUDA header is needed to include
// this.
#pragma once

namespace adazeta {

#if defined(ADAZETA_WITH_CUDA)
constexpr bool kCudaBuilt = true;
// Stores the number of devices; returns null, or the driver's reason why there are none.
const char* cuda_device_count(int* count);
// The lowest compute capability that the kernels run on, as 80 for 8.0; 0 where the compiler does not tell.
int cuda_lowest_capability();
#else
constexpr bool kCudaBuilt = false;
inline const char* cuda_device_count(int*) {
  return "built without CUDA (ADAZETA_BUILD_CUDA=0, or nvcc was not found)";
}
#endif

}  // namespace adazeta
