// The runtime behind cuda_runtime.h of this folder: fibers and barriers. And what csrc/bindings.cpp wants of the CPU.
#include <ucontext.h>
#include <csetjmp>

#include <algorithm>
#include <map>
#include <memory>
#include <vector>

#include "cpu/levels.h"
#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kSharedLimit = 163 << 10;  // what sm_80 has
// What is left of a block's 48 KiB for a kernel that declares as much as any may (test_cuda_compile.py).
constexpr size_t kSharedUnasked = (48 << 10) - (8 << 10);

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

// A context starts a fiber; afterwards _setjmp and _longjmp switch, which make no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf place;
  bool started;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  float shared_value[2];
  unsigned shuffles;
};

std::vector<Fiber> fibers;
ucontext_t origin;
jmp_buf scheduler;
unsigned thread_count, current;
const std::function<void()>* body;
std::vector<float> shared_memory;
std::map<const void*, size_t> shared_asked;

void wait(State state) {
  Fiber& me = fibers[current];
  me.state = state;
  if (_setjmp(me.place) == 0) _longjmp(scheduler, 1);
}

void run_body() {
  (*body)();
  fibers[current].state = State::kDone;
  _longjmp(scheduler, 1);
}

// Runs the current thread to its next barrier.
void resume() {
  Fiber& fiber = fibers[current];
  threadIdx = dim3(current);
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  swapcontext(&origin, &fiber.context);
}

// Lets threads [first, last) go on when every one that is not done waits at `barrier`.
bool release(unsigned first, unsigned last, State barrier) {
  unsigned waiting = 0, done = 0;
  for (unsigned t = first; t < last; ++t) {
    waiting += fibers[t].state == barrier;
    done += fibers[t].state == State::kDone;
  }
  // A shuffle needs all lanes; a block's barrier all threads that have not returned.
  const bool complete = barrier == State::kAtWarpBarrier ? waiting == last - first : waiting + done == last - first;
  if (waiting == 0 || !complete) return false;
  for (unsigned t = first; t < last; ++t) {
    if (fibers[t].state == barrier) fibers[t].state = State::kReady;
  }
  return true;
}

cudaError_t run_block(bool backwards) {
  for (unsigned t = 0; t < thread_count; ++t) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_body, 0);
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.shuffles = 0;
  }
  for (;;) {
    unsigned done = 0;
    for (unsigned i = 0; i < thread_count; ++i) {
      current = backwards ? thread_count - 1 - i : i;
      if (fibers[current].state == State::kReady) resume();
      done += fibers[current].state == State::kDone;
    }
    if (done == thread_count) return cudaSuccess;
    bool moved = false;
    for (unsigned first = 0; first < thread_count; first += kWarp) {
      moved |= release(first, first + kWarp, State::kAtWarpBarrier);
    }
    if (!moved && !release(0, thread_count, State::kAtBlockBarrier)) return cudaErrorLaunchFailure;
  }
}

}  // namespace

void __syncthreads() { wait(State::kAtBlockBarrier); }

float __shfl_xor_sync(unsigned, float value, int lane_mask) {
  const unsigned me = current;
  // Two slots in turn: a lane cannot be two shuffles ahead of another, so none overwrites a value that is to be read.
  const unsigned slot = fibers[me].shuffles++ % 2;
  fibers[me].shared_value[slot] = value;
  wait(State::kAtWarpBarrier);
  return fibers[me ^ static_cast<unsigned>(lane_mask)].shared_value[slot];
}

namespace shim {

float* dynamic_shared() { return shared_memory.data(); }

cudaError_t run(const void* function, dim3 grid, unsigned threads, size_t shared_bytes,
                const std::function<void()>& kernel) {
  if (threads % kWarp != 0) return cudaErrorLaunchFailure;
  if (shared_bytes > std::max(kSharedUnasked, shared_asked[function])) return cudaErrorInvalidValue;
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  thread_count = threads;
  body = &kernel;
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      shared_memory.assign(shared_bytes / sizeof(float), NAN);
      const cudaError_t error = run_block((x + y) % 2 != 0);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace shim

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(kSharedLimit);
  return cudaSetDevice(device);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute, int value) {
  const size_t bytes = static_cast<size_t>(value);
  if (bytes > kSharedLimit) return cudaErrorInvalidValue;
  shared_asked[function] = bytes;
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid argument" : "launch failure";
}

namespace adazeta {

const Kernels* find_kernels(const char*) { return nullptr; }
int supported_kernels(const Kernels**, int) { return 0; }

}  // namespace adazeta
