// What lets one source be C++ and CUDA.
#pragma once

#if defined(__CUDACC__)
#define ADAZETA_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define ADAZETA_HD __forceinline
#else
// always_inline: code that is compiled once per instruction set must not stay behind as a shared baseline function.
#define ADAZETA_HD inline __attribute__((always_inline))
#endif
