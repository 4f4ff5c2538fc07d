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
#include "adazeta/tt.h"
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

// Reads what TTAdapterLayout.encode wrote, from the count of input factors of one map on.
TTMap checked_map(const std::vector<int64_t>& code, size_t* at) {
  const auto next = [&] {
    if (*at >= code.size()) throw py::value_error("expected an encoded layout, got one that is cut short");
    return code[(*at)++];
  };
  const auto checked = [&](const char* what, int64_t most) {
    const int64_t value = next();
    if (value < 1 || value > most) {
      throw py::value_error(std::string("expected ") + what + " of 1 to " + std::to_string(most) + ", got " +
                            std::to_string(value));
    }
    return static_cast<int32_t>(value);
  };
  TTMap map{};
  map.in_count = checked("a number of cores", kMaxCores);
  map.out_count = checked("a number of cores", kMaxCores);
  if (core_count(map) > kMaxCores) throw py::value_error("expected at most 16 cores in a map");
  for (int k = 0; k < core_count(map); ++k) map.dims[k] = checked("a dimension", int64_t{1} << 30);
  map.ranks[0] = map.ranks[core_count(map)] = 1;
  for (int k = 1; k < core_count(map); ++k) map.ranks[k] = checked("a rank", int64_t{1} << 20);
  return map;
}

TTLayout checked_layout(const std::vector<int64_t>& code) {
  size_t at = 4;  // behind version, width, bottleneck and bias
  TTLayout layout{};
  layout.down = checked_map(code, &at);
  layout.up = checked_map(code, &at);
  layout.bias = code[3] != 0;
  return layout;
}

Act checked_act(int code) {
  if (code < 0 || code > static_cast<int>(Act::kIdentity)) {
    throw py::value_error("expected an act code of 0 (relu), 1 (gelu), 2 (silu), 3 (tanh) or 4 (identity), got " +
                          std::to_string(code));
  }
  return static_cast<Act>(code);
}

int32_t checked_rank(int64_t rank) {
  if (rank < 1 || rank > kMaxRank) {
    throw py::value_error("expected a rank of 1 to " + std::to_string(kMaxRank) + ", got " + std::to_string(rank));
  }
  return static_cast<int32_t>(rank);
}

void tt_factors(uintptr_t theta, uintptr_t out, const std::vector<int64_t>& layout, uintptr_t seeds, uintptr_t scales,
                int64_t probes, uint64_t offset, int distribution, int threads, const std::string& level) {
  TTFactorsParams params{pointer<const float>(theta),
                         pointer<float>(out),
                         checked_layout(layout),
                         pointer<const uint64_t>(seeds),
                         pointer<const float>(scales),
                         probes,
                         offset,
                         checked_distribution(distribution),
                         1};
  check_size(theta_numel(params.layout), offset);
  params.threads = useful_threads(threads, probes * (2 * theta_numel(params.layout) + factor_numel(params.layout)));
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  k.tt_factors(params);
}

void tt_adapter(uintptr_t x, uintptr_t y, int dtype, int64_t probes, int64_t tokens, const std::vector<int64_t>& layout,
                uintptr_t factors, int64_t factor_stride, int act, float scale, int threads, const std::string& level) {
  const TTLayout shape = checked_layout(layout);
  const Dtype type = checked_dtype(dtype);
  const int64_t width = d_in(shape.down), bottleneck = d_out(shape.down);
  if (bottleneck > kMaxBottleneck) {
    throw py::value_error("expected a bottleneck of at most " + std::to_string(kMaxBottleneck) + ", got " +
                          std::to_string(bottleneck));
  }
  const TTAdapterParams params{{pointer<void>(x), type},
                               {pointer<void>(y), type},
                               probes,
                               tokens,
                               width,
                               static_cast<int32_t>(bottleneck),
                               checked_rank(bond(shape.down)),
                               checked_rank(bond(shape.up)),
                               shape.bias,
                               pointer<const float>(factors),
                               factor_stride,
                               checked_act(act),
                               scale,
                               useful_threads(threads, probes * (2 * tokens * width + factor_numel(shape)))};
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  k.tt_adapter(params);
}

// One signature for tt_linear (base 0, scale 1) and low_rank_linear (bias 0).
template <void (*Kernels::*kKernel)(const LowRankParams&)>
void low_rank(uintptr_t x, uintptr_t base, uintptr_t y, int dtype, int64_t probes, int64_t tokens, int64_t d_in,
              int64_t d_out, int64_t rank, uintptr_t left, int64_t left_stride, uintptr_t right, int64_t right_stride,
              uintptr_t bias, int64_t bias_stride, float scale, int threads, const std::string& level) {
  const Dtype type = checked_dtype(dtype);
  const LowRankParams params{{pointer<void>(x), type},
                             {pointer<void>(base), type},
                             {pointer<void>(y), type},
                             probes,
                             tokens,
                             d_in,
                             d_out,
                             checked_rank(rank),
                             pointer<const float>(left),
                             pointer<const float>(right),
                             pointer<const float>(bias),
                             left_stride,
                             right_stride,
                             bias_stride,
                             scale,
                             useful_threads(threads, probes * (tokens + rank) * (d_in + d_out))};
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  (k.*kKernel)(params);
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
  m.def("tt_factors", &tt_factors, py::arg("theta"), py::arg("out"), py::arg("layout"), py::arg("seeds"),
        py::arg("scales"), py::arg("probes"), py::arg("offset"), py::arg("distribution"), py::arg("threads"),
        py::arg("level") = "auto");
  m.def("tt_adapter", &tt_adapter, py::arg("x"), py::arg("y"), py::arg("dtype"), py::arg("probes"), py::arg("tokens"),
        py::arg("layout"), py::arg("factors"), py::arg("factor_stride"), py::arg("act"), py::arg("scale"),
        py::arg("threads"), py::arg("level") = "auto");
  const auto def_low_rank = [&m](const char* name, auto function) {
    m.def(name, function, py::arg("x"), py::arg("base"), py::arg("y"), py::arg("dtype"), py::arg("probes"),
          py::arg("tokens"), py::arg("d_in"), py::arg("d_out"), py::arg("rank"), py::arg("left"),
          py::arg("left_stride"), py::arg("right"), py::arg("right_stride"), py::arg("bias"), py::arg("bias_stride"),
          py::arg("scale"), py::arg("threads"), py::arg("level") = "auto");
  };
  def_low_rank("tt_linear", &low_rank<&Kernels::tt_linear>);
  def_low_rank("low_rank_linear", &low_rank<&Kernels::low_rank_linear>);
  m.attr("MAX_CORES") = kMaxCores;
  m.attr("MAX_RANK") = kMaxRank;
  m.attr("MAX_BOTTLENECK") = kMaxBottleneck;
  m.def("levels", &levels, "Names of the instruction set levels that this CPU can run, best first.");
  m.def("cuda_built", [] { return kCudaBuilt; }, "Whether the module was built with CUDA.");
  m.def("cuda_device_count", [] {
    int count = 0;
    const char* error = cuda_device_count(&count);
    if (error != nullptr) throw std::runtime_error(error);
    return count;
  });
}
