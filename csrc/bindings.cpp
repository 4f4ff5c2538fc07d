// The Python module adazeta_kernels._native: raw pointers as integers in, error codes out as exceptions.
//
// Checks of shape, dtype, stride and device are in adazeta_kernels/backends/native.py; here only what would crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "adazeta/params.h"
#include "cpu/levels.h"
#include "cuda/probe.h"

namespace py = pybind11;
using namespace adazeta;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& kernels(const std::string& level) {
  const Kernels* found = find_kernels(level.c_str());
  if (found == nullptr) throw py::value_error("level '" + level + "' is not built or this CPU cannot run it");
  return *found;
}

Dtype checked_dtype(int code) {
  if (code < 0 || code > static_cast<int>(Dtype::kFloat16)) {
    throw py::value_error("expected a dtype code of 0 (float32), 1 (bfloat16) or 2 (float16), got " +
                          std::to_string(code));
  }
  return static_cast<Dtype>(code);
}

Distribution checked_distribution(int code) {
  if (code < 0 || code > static_cast<int>(Distribution::kRademacher)) {
    throw py::value_error("expected a distribution code of 0 (gaussian) or 1 (rademacher), got " +
                          std::to_string(code));
  }
  return static_cast<Distribution>(code);
}

// Fewer elements than this are done before other threads are awake. One thread or all: libgomp ends and starts threads
// when team sizes alternate.
constexpr int64_t kSerialElements = 65536;

int32_t useful_threads(int threads, int64_t elements) {
  if (threads < 1) throw py::value_error("expected at least 1 thread, got " + std::to_string(threads));
  return elements < kSerialElements ? 1 : threads;
}

void check_size(int64_t numel, uint64_t offset) {
  if (numel < 0 || offset > (uint64_t{1} << 63) - static_cast<uint64_t>(numel)) {
    throw py::value_error("expected indices below 2^63, got offset " + std::to_string(offset) + " and " +
                          std::to_string(numel) + " elements");
  }
}

void fill_normal(uintptr_t out, int64_t numel, int dtype, uint64_t seed, uint64_t offset, int distribution, int threads,
                 const std::string& level) {
  check_size(numel, offset);
  const FillNormalParams params{{pointer<void>(out), 0, checked_dtype(dtype)},
                                numel,
                                offset,
                                seed,
                                checked_distribution(distribution),
                                useful_threads(threads, numel)};
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  k.fill_normal(params);
}

void perturb(const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& numels, const std::vector<int>& dtypes,
             uintptr_t seeds, uintptr_t scales, int64_t seed_count, uint64_t offset, float decay, int distribution,
             int threads, const std::string& level) {
  if (pointers.size() != numels.size() || pointers.size() != dtypes.size()) {
    throw py::value_error("expected pointers, numels and dtypes of one length");
  }
  std::vector<TensorRef> tensors;
  tensors.reserve(pointers.size());
  int64_t numel = 0;
  for (size_t i = 0; i < pointers.size(); ++i) {
    check_size(numels[i], offset + static_cast<uint64_t>(numel));
    if (numels[i] > 0) tensors.push_back({pointer<void>(pointers[i]), numel, checked_dtype(dtypes[i])});
    numel += numels[i];
  }
  const PerturbParams params{tensors.data(),
                             static_cast<int64_t>(tensors.size()),
                             numel,
                             offset,
                             pointer<const uint64_t>(seeds),
                             pointer<const float>(scales),
                             seed_count,
                             decay,
                             checked_distribution(distribution),
                             useful_threads(threads, numel * (1 + seed_count))};
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  k.perturb(params);
}

void perturb_rows(uintptr_t theta, uintptr_t out, int64_t rows, int64_t numel, uintptr_t seeds, uintptr_t scales,
                  uint64_t offset, int distribution, int threads, const std::string& level) {
  check_size(numel, offset);
  const PerturbRowsParams params{pointer<const float>(theta),
                                 pointer<float>(out),
                                 rows,
                                 numel,
                                 offset,
                                 pointer<const uint64_t>(seeds),
                                 pointer<const float>(scales),
                                 checked_distribution(distribution),
                                 useful_threads(threads, rows * numel)};
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  k.perturb_rows(params);
}

std::vector<std::string> levels() {
  const Kernels* found[8];
  const int n = supported_kernels(found, 8);
  std::vector<std::string> names;
  for (int i = 0; i < n; ++i) names.emplace_back(found[i]->name);
  return names;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native ops of adazeta_kernels; call them through adazeta_kernels.";
  m.def("fill_normal", &fill_normal, py::arg("out"), py::arg("numel"), py::arg("dtype"), py::arg("seed"),
        py::arg("offset"), py::arg("distribution"), py::arg("threads"), py::arg("level") = "auto");
  m.def("perturb", &perturb, py::arg("pointers"), py::arg("numels"), py::arg("dtypes"), py::arg("seeds"),
        py::arg("scales"), py::arg("seed_count"), py::arg("offset"), py::arg("decay"), py::arg("distribution"),
        py::arg("threads"), py::arg("level") = "auto");
  m.def("perturb_rows", &perturb_rows, py::arg("theta"), py::arg("out"), py::arg("rows"), py::arg("numel"),
        py::arg("seeds"), py::arg("scales"), py::arg("offset"), py::arg("distribution"), py::arg("threads"),
        py::arg("level") = "auto");
  m.def("levels", &levels, "Names of the instruction set levels that this CPU can run, best first.");
  m.def("cuda_built", [] { return kCudaBuilt; }, "Whether the module was built with CUDA.");
  m.def("cuda_device_count", [] {
    int count = 0;
    const char* error = cuda_device_count(&count);
    if (error != nullptr) throw std::runtime_error(error);
    return count;
  });
}
