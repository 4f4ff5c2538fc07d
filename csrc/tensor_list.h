// A list of tensors as Python has it: read through DLPack's C exchange API, tens of nanoseconds a tensor and no torch
// header, where asking Python for address, size, dtype, strides and device takes half a microsecond.
//
// The structs below are those of DLPack 1.2 and later (github.com/dmlc/dlpack, include/dlpack/dlpack.h); torch hands
// out the functions in the capsule torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "checked.h"

namespace adazeta {
namespace dlpack {

struct Tensor {
  void* data;
  int32_t device_type, device_index;
  int32_t dimensions;
  uint8_t dtype_code, dtype_bits;
  uint16_t dtype_lanes;
  int64_t* shape;
  int64_t* strides;  // null: contiguous
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* owning_functions[3];
  int (*tensor_from_object)(void* object, Tensor* out);  // borrows; -1 with a Python error set
  void* current_stream;
};

constexpr int kFloat = 2, kBFloat = 4;  // dtype codes

inline int64_t numel(const Tensor& t) {
  int64_t n = 1;
  for (int32_t d = 0; d < t.dimensions; ++d) n *= t.shape[d];
  return n;
}

inline bool contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int32_t d = t.dimensions - 1; t.strides != nullptr && d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != expected) return false;
    expected *= t.shape[d];
  }
  return true;
}

// The code of params.h, or -1.
inline int dtype_code(const Tensor& t) {
  if (t.dtype_lanes != 1) return -1;
  if (t.dtype_code == kFloat && t.dtype_bits == 32) return static_cast<int>(Dtype::kFloat32);
  if (t.dtype_code == kFloat && t.dtype_bits == 16) return static_cast<int>(Dtype::kFloat16);
  return t.dtype_code == kBFloat && t.dtype_bits == 16 ? static_cast<int>(Dtype::kBFloat16) : -1;
}

}  // namespace dlpack

// Whether two of the tensors share memory.
inline bool overlap(const TensorList& list) {
  std::vector<std::pair<uintptr_t, uintptr_t>> spans;
  spans.reserve(list.tensors.size());
  for (size_t i = 0; i < list.tensors.size(); ++i) {
    const TensorRef& t = list.tensors[i];
    const int64_t end = i + 1 < list.tensors.size() ? list.tensors[i + 1].begin : list.numel;
    const uintptr_t start = reinterpret_cast<uintptr_t>(t.data);
    spans.emplace_back(start, start + static_cast<uintptr_t>((end - t.begin) * element_size(t.dtype)));
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].first < spans[i - 1].second) return true;
  }
  return false;
}

// The address of a freed tensor is its offset in nothing, which no size of memory brings up to here. That of a live one
// may lie below, but mostly does not.
constexpr uintptr_t kLowAddresses = uintptr_t{1} << 40;

// Reads a Python list of tensors whose class is exactly one of `classes`. False, and no Python error, when any is
// something else, of another dtype, not contiguous or not on the device of the first one, or when `api` is of an
// unknown version: the caller then asks Python, which also knows what to tell the user.
inline bool read_tensors(PyObject* params, const std::vector<PyObject*>& classes, const dlpack::ExchangeApi& api,
                         TensorList* list) {
  if (api.major != 1 || api.tensor_from_object == nullptr || !PyList_Check(params)) return false;
  const Py_ssize_t count = PyList_GET_SIZE(params);
  list->tensors.reserve(static_cast<size_t>(count));
  dlpack::Tensor first{};
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* object = PyList_GET_ITEM(params, i);
    const auto known = [object](PyObject* c) { return reinterpret_cast<PyObject*>(Py_TYPE(object)) == c; };
    if (std::none_of(classes.begin(), classes.end(), known)) return false;
    dlpack::Tensor tensor{};
    if (api.tensor_from_object(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    if (i == 0) first = tensor;
    const bool together = tensor.device_type == first.device_type && tensor.device_index == first.device_index;
    const int dtype = dlpack::dtype_code(tensor);
    const int64_t numel = dlpack::numel(tensor);
    if (!together || dtype < 0 || (numel > 0 && !dlpack::contiguous(tensor))) return false;
    if (numel == 0) continue;
    char* data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    // It may have been freed, or be a negated view, of which DLPack tells nothing: torch makes those of every other
    // number of a tensor, so that one is contiguous only where it has a single number.
    if (reinterpret_cast<uintptr_t>(data) < kLowAddresses || numel == 1) list->doubtful.push_back(i);
    list->tensors.push_back({data, list->numel, static_cast<Dtype>(dtype)});
    list->numel += numel;
  }
  return true;
}

}  // namespace adazeta
