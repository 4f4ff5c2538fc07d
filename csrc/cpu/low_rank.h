// y = base + scale ((x L) R + bias), which tt_linear and low_rank_linear share.
#pragma once

#include "levels.h"
#include "parallel.h"
#include "token_tile.h"

namespace adazeta {
namespace ADAZETA_LEVEL {
namespace {

inline void low_rank(const LowRankParams& p) {
  const bool rows = row_by_row(p.tokens, p.rank);
  const int64_t step = rows ? kFewTokens : kTokens, tiles = (p.tokens + step - 1) / step;
  const Scratch scratch(p.threads, rows ? 0 : p.rank * panel_pitch(p.d_in));
  for_ranges(p.threads, p.probes * tiles, [&](int thread, int64_t first, int64_t last) {
    alignas(64) float h[kMaxRank * kTokens] = {};
    float* panel = scratch.of(thread);
    int64_t turned = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t probe = item / tiles, token = item % tiles * step, left = p.tokens - token;
      const int count = static_cast<int>(left < step ? left : step);
      const int64_t row = probe * p.tokens + token;
      const float* left_factor = p.left + probe * p.left_stride;
      if (rows) {
        for (int t = 0; t < count; ++t) {
          project_row(p.x.dtype, at(p.x, (row + t) * p.d_in), left_factor, p.d_in, p.rank, h + t);
        }
      } else {
        if (turned != probe) turn(left_factor, p.d_in, p.rank, panel);
        turned = probe;
        project(p.x.dtype, at(p.x, row * p.d_in), count, panel, p.d_in, p.rank, h);
      }
      for (int i = 0; i < p.rank * kTokens; ++i) h[i] *= p.scale;
      expand(p.x.dtype, at(p.base, row * p.d_out), at(p.y, row * p.d_out), count, h, p.right + probe * p.right_stride,
             p.d_out, p.rank, p.bias == nullptr ? nullptr : p.bias + probe * p.bias_stride, p.scale);
    }
  });
}

}  // namespace
}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
