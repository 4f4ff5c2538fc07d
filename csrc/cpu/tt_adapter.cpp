// tt_adapter: y = x + scale ((act((x L1) R1 + b1) L2) R2 + b2), tile by tile of tokens, so that x is read from memory
// once: its second use finds it in the cache.
#include "levels.h"
#include "parallel.h"
#include "token_tile.h"
#include "vec.h"

namespace adazeta {
namespace ADAZETA_LEVEL {
namespace {

struct Factors {
  const float *left_down, *right_down, *bias_down, *left_up, *right_up, *bias_up;
};

Factors split(const TTAdapterParams& p, int64_t probe) {
  const float* at = p.factors + probe * p.factor_stride;
  const auto take = [&at](int64_t n) {
    const float* block = at;
    at += n;
    return block;
  };
  Factors f;
  f.left_down = take(p.width * p.rank_down);
  f.right_down = take(static_cast<int64_t>(p.rank_down) * p.bottleneck);
  f.bias_down = p.bias ? take(p.bottleneck) : nullptr;
  f.left_up = take(static_cast<int64_t>(p.bottleneck) * p.rank_up);
  f.right_up = take(p.rank_up * p.width);
  f.bias_up = p.bias ? take(p.width) : nullptr;
  return f;
}

// g [rank_up, kTokens] <- scale act(h R1 + b1) L2, tokens as lanes. kRank is both ranks, 0 when they differ or are
// large.
template <Act kAct, int kRank>
void narrow_tile(const TTAdapterParams& p, const Factors& f, const float* h, float* g) {
  const int rank_down = kRank == 0 ? p.rank_down : kRank, rank_up = kRank == 0 ? p.rank_up : kRank;
  for (int lane = 0; lane < kTokens; lane += kVec) {
    Vec in[kRank == 0 ? kMaxRank : kRank], sum[kRank == 0 ? kMaxRank : kRank];
    for (int j = 0; j < rank_down; ++j) in[j] = load(h + j * kTokens + lane);
    for (int j = 0; j < rank_up; ++j) sum[j] = Vec{};
    for (int b = 0; b < p.bottleneck; ++b) {
      Vec a = VecMath::set(f.bias_down == nullptr ? 0.0f : f.bias_down[b]);
      for (int j = 0; j < rank_down; ++j) a = VecMath::fma(in[j], VecMath::set(f.right_down[j * p.bottleneck + b]), a);
      a = activation<VecMath, kAct>(a);
      for (int j = 0; j < rank_up; ++j) sum[j] = VecMath::fma(a, VecMath::set(f.left_up[b * rank_up + j]), sum[j]);
    }
    for (int j = 0; j < rank_up; ++j) store(g + j * kTokens + lane, sum[j] * VecMath::set(p.scale));
  }
}

template <Act kAct>
void narrow_tile(const TTAdapterParams& p, const Factors& f, const float* h, float* g) {
  switch (p.rank_down == p.rank_up ? p.rank_down : 0) {
    case 1:
      return narrow_tile<kAct, 1>(p, f, h, g);
    case 2:
      return narrow_tile<kAct, 2>(p, f, h, g);
    case 3:
      return narrow_tile<kAct, 3>(p, f, h, g);
    case 4:
      return narrow_tile<kAct, 4>(p, f, h, g);
    case 5:
      return narrow_tile<kAct, 5>(p, f, h, g);
    default:
      return narrow_tile<kAct, 0>(p, f, h, g);
  }
}

// The same for one token, the bottleneck as lanes.
template <Act kAct>
void narrow_row(const TTAdapterParams& p, const Factors& f, const float* h, float* g) {
  float a[kMaxBottleneck];
  for (int b = 0; b < p.bottleneck; b += kVec) {
    const int n = p.bottleneck - b < kVec ? p.bottleneck - b : kVec;
    Vec sum = f.bias_down == nullptr ? Vec{} : load(f.bias_down + b, n);
    for (int j = 0; j < p.rank_down; ++j) {
      sum = VecMath::fma(VecMath::set(h[j * kTokens]), load(f.right_down + j * p.bottleneck + b, n), sum);
    }
    store(a + b, activation<VecMath, kAct>(sum), n);
  }
  project_row(Dtype::kFloat32, a, f.left_up, p.bottleneck, p.rank_up, g);
  for (int j = 0; j < p.rank_up; ++j) g[j * kTokens] *= p.scale;
}

template <Act kAct>
void run(const TTAdapterParams& p) {
  const bool rows = row_by_row(p.tokens, p.rank_down > p.rank_up ? p.rank_down : p.rank_up);
  const int64_t step = rows ? kFewTokens : kTokens, tiles = (p.tokens + step - 1) / step;
  const Scratch scratch(p.threads, rows ? 0 : p.rank_down * panel_pitch(p.width));
  for_ranges(p.threads, p.probes * tiles, [&](int thread, int64_t first, int64_t last) {
    alignas(64) float h[kMaxRank * kTokens] = {}, g[kMaxRank * kTokens];
    float* panel = scratch.of(thread);
    int64_t turned = -1;
    for (int64_t item = first; item < last; ++item) {
      const int64_t probe = item / tiles, token = item % tiles * step, left = p.tokens - token;
      const int count = static_cast<int>(left < step ? left : step);
      const Factors f = split(p, probe);
      const auto position = [&](int t) { return (probe * p.tokens + token + t) * p.width; };
      if (rows) {
        for (int t = 0; t < count; ++t) {
          project_row(p.x.dtype, at(p.x, position(t)), f.left_down, p.width, p.rank_down, h);
          narrow_row<kAct>(p, f, h, g + t);
        }
      } else {
        if (turned != probe) turn(f.left_down, p.width, p.rank_down, panel);
        turned = probe;
        project(p.x.dtype, at(p.x, position(0)), count, panel, p.width, p.rank_down, h, at(p.y, position(0)));
        narrow_tile<kAct>(p, f, h, g);
      }
      expand(p.x.dtype, at(p.x, position(0)), at(p.y, position(0)), count, g, f.right_up, p.width, p.rank_up, f.bias_up,
             p.scale);
    }
  });
}

}  // namespace

void tt_adapter(const TTAdapterParams& p) {
  switch (p.act) {
    case Act::kRelu:
      return run<Act::kRelu>(p);
    case Act::kGelu:
      return run<Act::kGelu>(p);
    case Act::kSilu:
      return run<Act::kSilu>(p);
    case Act::kTanh:
      return run<Act::kTanh>(p);
    case Act::kIdentity:
      return run<Act::kIdentity>(p);
  }
}

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
