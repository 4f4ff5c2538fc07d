// How a thread reads and writes eight neighbouring numbers of a token. Loading is apart from widening to float32, so
// that the loads of several tokens are under way before the first is used.
#pragma once

#include <cstdint>

#include "adazeta/params.h"
#include "cuda/group.h"

namespace adazeta {

// Of one dtype, in accesses of 16 bytes: every token starts at a multiple of 16 bytes and has a multiple of 8 numbers.
template <Dtype kDtype>
class VectorAccess {
 public:
  static constexpr int kHeld = kDtype == Dtype::kFloat32 ? 4 : 8;  // tokens whose numbers a thread holds at a time
  struct Raw {
    uint4 bits[kDtype == Dtype::kFloat32 ? 2 : 1];
  };
  ADAZETA_HD explicit VectorAccess(const Tokens& tokens) : data_(tokens.data) {}
  ADAZETA_HD bool empty() const { return data_ == nullptr; }
  ADAZETA_HD Raw load(int64_t at, int64_t) const {
    const uint4* from = reinterpret_cast<const uint4*>(address(at));
    Raw raw;
    raw.bits[0] = from[0];
    if constexpr (kDtype == Dtype::kFloat32) raw.bits[1] = from[1];
    return raw;
  }
  ADAZETA_HD void widen(const Raw& raw, float (&to)[kGroup]) const { widen_group<kDtype>(raw.bits, to); }
  ADAZETA_HD void store(int64_t at, int64_t, const float (&from)[kGroup]) const {
    Raw raw;
    narrow_group<kDtype>(from, raw.bits);
    // Marked as not read again soon.
    uint4* to = reinterpret_cast<uint4*>(const_cast<char*>(address(at)));
    __stcs(to, raw.bits[0]);
    if constexpr (kDtype == Dtype::kFloat32) __stcs(to + 1, raw.bits[1]);
  }

 private:
  ADAZETA_HD const char* address(int64_t at) const {
    return static_cast<const char*>(data_) + at * element_bytes(kDtype);
  }
  void* data_;
};

// Of any dtype, alignment and length: numbers at and behind `end` are neither read nor written.
class AnyAccess {
 public:
  static constexpr int kHeld = 4;
  struct Raw {
    float values[kGroup];
  };
  ADAZETA_HD explicit AnyAccess(const Tokens& tokens) : tokens_(tokens) {}
  ADAZETA_HD bool empty() const { return tokens_.data == nullptr; }
  ADAZETA_HD Raw load(int64_t at, int64_t end) const {
    Raw raw;
    load_group_within(tokens_.data, tokens_.dtype, at, end, raw.values);
    return raw;
  }
  ADAZETA_HD void widen(const Raw& raw, float (&to)[kGroup]) const {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = raw.values[i];
  }
  ADAZETA_HD void store(int64_t at, int64_t end, const float (&from)[kGroup]) const {
    store_group_within(tokens_.data, tokens_.dtype, at, end, from);
  }

 private:
  Tokens tokens_;
};

template <class Access>
struct AccessType {
  using Type = Access;
};

// Calls run(AccessType) with the VectorAccess of a dtype.
template <class Run>
int with_vectors(Dtype dtype, const Run& run) {
  if (dtype == Dtype::kFloat32) return run(AccessType<VectorAccess<Dtype::kFloat32>>{});
  if (dtype == Dtype::kBFloat16) return run(AccessType<VectorAccess<Dtype::kBFloat16>>{});
  return run(AccessType<VectorAccess<Dtype::kFloat16>>{});
}

// Whether VectorAccess is for tokens of d numbers; for absent ones too.
inline bool vectors(const Tokens& tokens, int64_t d) {
  return d % kGroup == 0 && aligned_16(tokens.data, tokens.dtype, 0);
}

}  // namespace adazeta
