// Work spread over threads, and memory for each of them.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace adazeta {
namespace {

// Calls body(thread, first, last) with contiguous ranges of 0 .. items - 1; no parallel region for one thread.
template <class Body>
void for_ranges(int threads, int64_t items, const Body& body) {
#if defined(_OPENMP)
  if (threads > 1 && items > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
      body(static_cast<int>(thread), items * thread / count, items * (thread + 1) / count);
    }
    return;
  }
#endif
  body(0, 0, items);
}

// Numbers on a cache line's boundary, the same count for each thread. Allocated outside of parallel regions, where an
// exception may leave.
class Scratch {
 public:
  Scratch(int threads, int64_t numbers)
      : stride_((numbers + 15) / 16 * 16), data_(allocate(static_cast<size_t>(stride_) * threads)) {}
  float* of(int thread) const { return data_.get() + stride_ * thread; }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  static float* allocate(size_t numbers) {
    return static_cast<float*>(::operator new[](numbers * sizeof(float), std::align_val_t{64}));
  }
  int64_t stride_;
  std::unique_ptr<float[], Free> data_;
};

}  // namespace
}  // namespace adazeta
