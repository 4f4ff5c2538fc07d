// The tensor-train layout of one adapter, and the contraction of its cores, for C++ and CUDA alike.
#pragma once

#include <cstdint>

#include "adazeta/fma.h"
#include "adazeta/macros.h"
#include "adazeta/params.h"

namespace adazeta {

// One element of theta + scale z; a zero scale adds nothing (docs/perturbation-spec.md, section 6).
template <class Fma>
ADAZETA_HD float perturbed(float theta, float scale, float z) {
  return scale == 0.0f ? theta : Fma::apply(scale, z, theta);
}

// Core k of a map has shape (ranks[k], dims[k], ranks[k + 1]) and lies behind core k - 1.
ADAZETA_HD int64_t core_numel(const TTMap& map, int k) {
  return static_cast<int64_t>(map.ranks[k]) * map.dims[k] * map.ranks[k + 1];
}

ADAZETA_HD int64_t core_begin(const TTMap& map, int k) {
  int64_t begin = 0;
  for (int i = 0; i < k; ++i) begin += core_numel(map, i);
  return begin;
}

// Product of dims[first] .. dims[last - 1].
ADAZETA_HD int64_t dims_product(const TTMap& map, int first, int last) {
  int64_t product = 1;
  for (int i = first; i < last; ++i) product *= map.dims[i];
  return product;
}

ADAZETA_HD int core_count(const TTMap& map) { return map.in_count + map.out_count; }
ADAZETA_HD int bond(const TTMap& map) { return map.ranks[map.in_count]; }
ADAZETA_HD int64_t d_in(const TTMap& map) { return dims_product(map, 0, map.in_count); }
ADAZETA_HD int64_t d_out(const TTMap& map) { return dims_product(map, map.in_count, core_count(map)); }
ADAZETA_HD int64_t map_numel(const TTMap& map) { return core_begin(map, core_count(map)); }
// Numbers in L (d_in, bond) and R (bond, d_out).
ADAZETA_HD int64_t left_numel(const TTMap& map) { return d_in(map) * bond(map); }
ADAZETA_HD int64_t right_numel(const TTMap& map) { return d_out(map) * bond(map); }

ADAZETA_HD int64_t theta_numel(const TTLayout& layout) {
  const int64_t biases = layout.bias ? d_out(layout.down) + d_out(layout.up) : 0;
  return map_numel(layout.down) + map_numel(layout.up) + biases;
}

ADAZETA_HD int64_t factor_numel(const TTLayout& layout) {
  const int64_t biases = layout.bias ? d_out(layout.down) + d_out(layout.up) : 0;
  return left_numel(layout.down) + right_numel(layout.down) + left_numel(layout.up) + right_numel(layout.up) + biases;
}

// Contracts cores first .. last - 1 of `map` from the right, so that rows stay long: out has shape
// (ranks[first] dims[first], .., dims[last - 1] ranks[last]). `ops.multiply(c, a, b, m, k, n)` is c = a b for row-major
// (m, k) and (k, n), `ops.copy(to, from, n)` a copy; on a GPU both end with a barrier of the block. `scratch` holds
// chain_halves() times scratch_half numbers, which is at least chain_scratch().
template <class Ops>
ADAZETA_HD void contract_chain(const TTMap& map, int first, int last, const float* cores, float* scratch,
                               int64_t scratch_half, float* out, const Ops& ops) {
  const float* right = cores + core_begin(map, last - 1);
  int64_t columns = static_cast<int64_t>(map.dims[last - 1]) * map.ranks[last];
  if (last - first == 1) {
    ops.copy(out, right, map.ranks[first] * columns);
    return;
  }
  for (int k = last - 2; k >= first; --k) {
    float* target = k == first ? out : scratch + ((last - k) & 1) * scratch_half;
    const int64_t rows = static_cast<int64_t>(map.ranks[k]) * map.dims[k];
    ops.multiply(target, cores + core_begin(map, k), right, rows, map.ranks[k + 1], columns);
    right = target;
    columns *= map.dims[k];
  }
}

// Intermediate products of contract_chain that exist at one time.
ADAZETA_HD int chain_halves(int first, int last) {
  const int products = last - first - 2;
  return products < 0 ? 0 : products < 2 ? products : 2;
}

// Numbers in the largest of them.
ADAZETA_HD int64_t chain_scratch(const TTMap& map, int first, int last) {
  int64_t most = 0, columns = map.ranks[last];
  for (int k = last - 1; k > first; --k) {
    columns *= map.dims[k];
    const int64_t numel = map.ranks[k] * columns;
    if (k < last - 1 && numel > most) most = numel;
  }
  return most;
}

// The room contract_adapter needs: `halves` times `half` numbers. A multiple of 4, so that all halves are aligned.
struct FactorsScratch {
  int64_t half;
  int halves;
};
ADAZETA_HD FactorsScratch factors_scratch(const TTLayout& layout) {
  FactorsScratch most{0, 0};
  for (int m = 0; m < 2; ++m) {
    const TTMap& map = m == 0 ? layout.down : layout.up;
    for (int side = 0; side < 2; ++side) {
      const int first = side == 0 ? 0 : map.in_count, last = side == 0 ? map.in_count : core_count(map);
      const int64_t half = (chain_scratch(map, first, last) + 3) / 4 * 4;
      const int halves = chain_halves(first, last);
      most.half = half > most.half ? half : most.half;
      most.halves = halves > most.halves ? halves : most.halves;
    }
  }
  return most;
}

// theta -> factors: L, R and bias of the map down, then of up, each block behind the other, as
// adazeta_kernels/layout.py cuts them.
template <class Ops>
ADAZETA_HD void contract_adapter(const TTLayout& layout, const float* theta, float* scratch, float* out,
                                 const Ops& ops) {
  const int64_t scratch_half = factors_scratch(layout).half;
  for (int m = 0; m < 2; ++m) {
    const TTMap& map = m == 0 ? layout.down : layout.up;
    contract_chain(map, 0, map.in_count, theta, scratch, scratch_half, out, ops);
    out += left_numel(map);
    contract_chain(map, map.in_count, core_count(map), theta, scratch, scratch_half, out, ops);
    out += right_numel(map);
    theta += map_numel(map);
    if (layout.bias) {
      ops.copy(out, theta, d_out(map));
      out += d_out(map);
      theta += d_out(map);
    }
  }
}

}  // namespace adazeta
