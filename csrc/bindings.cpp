// The Python module adazeta_kernels._native: raw pointers as integers in, error codes out as exceptions.
//
// Checks of shape, dtype, stride and device are in adazeta_kernels/backends/native.py; here only what would crash.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "adazeta/params.h"
#include "adazeta/tt.h"
#include "checked.h"
#include "cpu/huge_pages.h"
#include "cpu/levels.h"
#include "cuda/probe.h"
#include "tensor_list.h"
#if defined(ADAZETA_WITH_CUDA)
#include "cuda_calls.h"
#endif

namespace py = pybind11;
using namespace adazeta;

namespace {

const Kernels& kernels(const std::string& level) {
  const Kernels* found = find_kernels(level.c_str());
  if (found == nullptr) throw py::value_error("level '" + level + "' is not built or this CPU cannot run it");
  return *found;
}

// Fewer elements than this are done before other threads are awake. One thread or all: libgomp ends and starts threads
// when team sizes alternate.
constexpr int64_t kSerialElements = 65536;

int32_t useful_threads(int threads, int64_t elements) {
  if (threads < 1) throw py::value_error("expected at least 1 thread, got " + std::to_string(threads));
  return elements < kSerialElements ? 1 : threads;
}

void fill_normal(uintptr_t out, int64_t numel, int dtype, uint64_t seed, uint64_t offset, int distribution, int threads,
                 const std::string& level) {
  FillNormalParams params = fill_normal_params(out, numel, dtype, seed, offset, distribution);
  params.threads = useful_threads(threads, numel);
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  k.fill_normal(params);
}

// None where Python has to look closer.
std::unique_ptr<TensorList> read_list(const py::list& params, const py::tuple& classes, const py::capsule& api) {
  std::vector<PyObject*> known;
  for (const py::handle c : classes) known.push_back(c.ptr());
  auto list = std::make_unique<TensorList>();
  const bool read = read_tensors(params.ptr(), known, *api.get_pointer<dlpack::ExchangeApi>(), list.get());
  return read ? std::move(list) : nullptr;
}

void perturb(const TensorList& list, uintptr_t seeds, uintptr_t scales, int64_t seed_count, uint64_t offset,
             float decay, int distribution, int threads, const std::string& level) {
  check_size(list.numel, offset);
  PerturbParams params = perturb_params(list, seeds, scales, seed_count, offset, decay, distribution);
  const std::vector<float> kept(params.scales, params.scales + seed_count);  // they may lie in a tensor of the list
  params.scales = kept.data();
  params.threads = useful_threads(threads, list.numel * (1 + seed_count));
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  k.perturb(params);
}

void perturb_rows(uintptr_t theta, uintptr_t out, int64_t rows, int64_t numel, uintptr_t seeds, uintptr_t scales,
                  uint64_t offset, int distribution, int threads, const std::string& level) {
  PerturbRowsParams params = perturb_rows_params(theta, out, rows, numel, seeds, scales, offset, distribution);
  params.threads = useful_threads(threads, rows * numel);
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  k.perturb_rows(params);
}

void tt_factors(uintptr_t theta, uintptr_t out, const std::vector<int64_t>& layout, int64_t adapters, uintptr_t seeds,
                uintptr_t scales, int64_t probes, uint64_t offset, int distribution, int threads,
                const std::string& level) {
  TTFactorsParams params = tt_factors_params(theta, out, layout, adapters, seeds, scales, probes, offset, distribution);
  const int64_t items = adapters * probes, factors = factor_numel(params.layout);
  params.threads = useful_threads(threads, items * (2 * theta_numel(params.layout) + factors));
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  prefer_huge_pages(params.out, items * factors * 4);
  k.tt_factors(params);
}

void tt_adapter(uintptr_t x, uintptr_t y, int dtype, int64_t probes, int64_t tokens, const std::vector<int64_t>& layout,
                uintptr_t factors, int64_t factor_stride, int act, float scale, int threads, const std::string& level) {
  TTAdapterParams params = tt_adapter_params(x, y, dtype, probes, tokens, layout, factors, factor_stride, act, scale);
  const int64_t factor_count = (params.width + params.bottleneck) * (params.rank_down + params.rank_up + params.bias);
  params.threads = useful_threads(threads, probes * (2 * tokens * params.width + factor_count));
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  prefer_huge_pages(params.y.data, probes * tokens * params.width * element_size(params.y.dtype));
  k.tt_adapter(params);
}

// One signature for tt_linear (base 0, scale 1) and low_rank_linear (bias 0).
template <void (*Kernels::*kKernel)(const LowRankParams&)>
void low_rank(uintptr_t x, uintptr_t base, uintptr_t y, int dtype, int64_t probes, int64_t tokens, int64_t d_in,
              int64_t d_out, int64_t rank, uintptr_t left, int64_t left_stride, uintptr_t right, int64_t right_stride,
              uintptr_t bias, int64_t bias_stride, float scale, int threads, const std::string& level) {
  LowRankParams params = low_rank_params(x, base, y, dtype, probes, tokens, d_in, d_out, rank, left, left_stride, right,
                                         right_stride, bias, bias_stride, scale);
  params.threads = useful_threads(threads, probes * (tokens + rank) * (d_in + d_out));
  const Kernels& k = kernels(level);
  const py::gil_scoped_release release;
  prefer_huge_pages(params.y.data, probes * tokens * d_out * element_size(params.y.dtype));
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
  py::class_<TensorList>(m, "TensorList", py::module_local())
      .def(py::init([](const std::vector<uintptr_t>& pointers, const std::vector<int64_t>& numels,
                       const std::vector<int>& dtypes) { return checked_tensors(pointers, numels, dtypes, 0); }),
           py::arg("pointers"), py::arg("numels"), py::arg("dtypes"))
      .def_readonly("numel", &TensorList::numel)
      .def_readonly("doubtful", &TensorList::doubtful)
      .def("overlap", &overlap);
  m.def("read_tensors", &read_list, py::arg("params"), py::arg("classes"), py::arg("api"));
  m.def("perturb", &perturb, py::arg("tensors"), py::arg("seeds"), py::arg("scales"), py::arg("seed_count"),
        py::arg("offset"), py::arg("decay"), py::arg("distribution"), py::arg("threads"), py::arg("level") = "auto");
  m.def("perturb_rows", &perturb_rows, py::arg("theta"), py::arg("out"), py::arg("rows"), py::arg("numel"),
        py::arg("seeds"), py::arg("scales"), py::arg("offset"), py::arg("distribution"), py::arg("threads"),
        py::arg("level") = "auto");
  m.def("tt_factors", &tt_factors, py::arg("theta"), py::arg("out"), py::arg("layout"), py::arg("adapters"),
        py::arg("seeds"), py::arg("scales"), py::arg("probes"), py::arg("offset"), py::arg("distribution"),
        py::arg("threads"), py::arg("level") = "auto");
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
#if defined(ADAZETA_WITH_CUDA)
  m.def("cuda_lowest_capability", &cuda_lowest_capability);
  // Device addresses; `where` is (index of the device, address of the stream). Seeds and scales are host addresses.
  const auto released = py::call_guard<py::gil_scoped_release>();
  m.def("cuda_fill_normal", &cuda::fill_normal, released, py::arg("out"), py::arg("numel"), py::arg("dtype"),
        py::arg("seed"), py::arg("offset"), py::arg("distribution"), py::arg("where"));
  m.def("cuda_perturb", &cuda::perturb, released, py::arg("pointers"), py::arg("numels"), py::arg("dtypes"),
        py::arg("seeds"), py::arg("scales"), py::arg("seed_count"), py::arg("offset"), py::arg("decay"),
        py::arg("distribution"), py::arg("table"), py::arg("where"));
  m.def("cuda_perturb_table_bytes", &cuda_perturb_table_bytes, py::arg("tensors"), py::arg("seeds"));
  m.def("cuda_write_perturb_table", &cuda::write_perturb_table, py::arg("pointers"), py::arg("numels"),
        py::arg("dtypes"), py::arg("seeds"), py::arg("scales"), py::arg("seed_count"), py::arg("host"));
  m.def("cuda_perturb_rows", &cuda::perturb_rows, released, py::arg("theta"), py::arg("out"), py::arg("rows"),
        py::arg("numel"), py::arg("seeds"), py::arg("scales"), py::arg("offset"), py::arg("distribution"),
        py::arg("where"));
  m.def("cuda_tt_factors_scratch", &cuda::tt_factors_scratch, py::arg("layout"), py::arg("where"));
  m.def("cuda_tt_factors", &cuda::tt_factors, released, py::arg("theta"), py::arg("out"), py::arg("layout"),
        py::arg("adapters"), py::arg("seeds"), py::arg("scales"), py::arg("probes"), py::arg("offset"),
        py::arg("distribution"), py::arg("scratch"), py::arg("where"));
  m.def("cuda_tt_adapter", &cuda::tt_adapter, released, py::arg("x"), py::arg("y"), py::arg("dtype"), py::arg("probes"),
        py::arg("tokens"), py::arg("layout"), py::arg("factors"), py::arg("factor_stride"), py::arg("act"),
        py::arg("scale"), py::arg("scratch"), py::arg("where"));
  m.def("cuda_tt_adapter_scratch", &cuda::tt_adapter_scratch, py::arg("probes"), py::arg("tokens"), py::arg("layout"),
        py::arg("where"));
  m.def("cuda_tt_adapter_from_cores", &cuda::tt_adapter_from_cores, released, py::arg("x"), py::arg("y"),
        py::arg("dtype"), py::arg("probes"), py::arg("tokens"), py::arg("layout"), py::arg("theta"), py::arg("seeds"),
        py::arg("scales"), py::arg("offset"), py::arg("distribution"), py::arg("act"), py::arg("scale"),
        py::arg("where"));
  m.def("cuda_low_rank", &cuda::low_rank, released, py::arg("x"), py::arg("base"), py::arg("y"), py::arg("dtype"),
        py::arg("probes"), py::arg("tokens"), py::arg("d_in"), py::arg("d_out"), py::arg("rank"), py::arg("left"),
        py::arg("left_stride"), py::arg("right"), py::arg("right_stride"), py::arg("bias"), py::arg("bias_stride"),
        py::arg("scale"), py::arg("where"));
#endif
}
