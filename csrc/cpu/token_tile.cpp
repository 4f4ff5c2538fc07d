#include "token_tile.h"

#include <cstring>

#include "vec.h"

namespace adazeta {
namespace ADAZETA_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kGroup = 4;  // tokens together: accumulators, one per token and rank, fill the registers
#else
constexpr int kGroup = 2;
#endif
constexpr int kMaxPart = 6;  // ranks together

// Calls use(std::integral_constant-like n) for n in 1 .. kMax.
template <int kN>
struct Number {
  static constexpr int value = kN;
};
template <int kMax, class Use>
ADAZETA_HD void with_number(int n, const Use& use) {
  if constexpr (kMax == 1) {
    use(Number<1>{});
  } else {
    n == kMax ? use(Number<kMax>{}) : with_number<kMax - 1>(n, use);
  }
}

template <class Use>
ADAZETA_HD void with_dtype(Dtype dtype, const Use& use) {
  if (dtype == Dtype::kFloat32) return use(float{});
  if (dtype == Dtype::kBFloat16) return use(BFloat16{});
  return use(Float16{});
}

// Columns of x together: kMaxPart rows of factors as wide stay in the first-level cache while all tokens pass.
constexpr int64_t kColumns = 1024;

// Calls use(begin, end) for stretches of kColumns of the d columns.
template <class Use>
ADAZETA_HD void for_columns(int64_t d, const Use& use) {
  for (int64_t begin = 0; begin < d; begin += kColumns) use(begin, begin + kColumns < d ? begin + kColumns : d);
}

// sum [kCount, kMaxPart] += kCount tokens times kPart columns of the turned L, over columns begin .. end - 1 of x.
template <class X, int kCount, int kPart>
void project_part(const X* x, const float* panel, int64_t d, int64_t begin, int64_t end, Vec (*total)[kMaxPart],
                  const X* next) {
  const int64_t pitch = panel_pitch(d);
  Vec sum[kCount][kPart];
  for (int t = 0; t < kCount; ++t) {
    for (int j = 0; j < kPart; ++j) sum[t][j] = total[t][j];
  }
  const auto columns = [&](int64_t i, auto load_x) {
    Vec value[kCount];
    for (int t = 0; t < kCount; ++t) {
      value[t] = load_x(x + t * d + i);
      if (next != nullptr) __builtin_prefetch(next + t * d + i, 1);
    }
    for (int j = 0; j < kPart; ++j) {
      const Vec left = load(panel + j * pitch + i);
      for (int t = 0; t < kCount; ++t) sum[t][j] = VecMath::fma(value[t], left, sum[t][j]);
    }
  };
  int64_t i = begin;
  for (; i + kVec <= end; i += kVec) columns(i, [](const X* p) { return load(p); });
  if (i < end) {
    const int rest = static_cast<int>(end - i);
    columns(i, [rest](const X* p) { return load(p, rest); });
  }
  for (int t = 0; t < kCount; ++t) {
    for (int j = 0; j < kPart; ++j) total[t][j] = sum[t][j];
  }
}

template <class Y, int kCount, int kRank>
void expand_part(const Y* base, Y* y, const float* g, const float* right, int64_t d, int64_t begin, int64_t end,
                 int rank, const float* bias, float scale) {
  const int ranks = kRank == 0 ? rank : kRank;
  // In registers: the compiler must assume that y overlaps g, and would load g again and again.
  Vec known[kRank == 0 ? 1 : kRank][kCount];
  for (int j = 0; j < kRank; ++j) {
    for (int t = 0; t < kCount; ++t) known[j][t] = VecMath::set(g[j * kTokens + t]);
  }
  const auto columns = [&](int64_t i, auto load_y, auto load_f, auto store_y) {
    Vec sum[kCount];
    const Vec first = bias == nullptr ? Vec{} : VecMath::set(scale) * load_f(bias + i);
    for (int t = 0; t < kCount; ++t) sum[t] = first;
    for (int j = 0; j < ranks; ++j) {
      const Vec row = load_f(right + j * d + i);
      for (int t = 0; t < kCount; ++t) {
        sum[t] = VecMath::fma(kRank == 0 ? VecMath::set(g[j * kTokens + t]) : known[j][t], row, sum[t]);
      }
    }
    for (int t = 0; t < kCount; ++t) {
      if (base == nullptr) {
        store_y(y + t * d + i, sum[t]);
      } else {
        store_y(y + t * d + i, load_y(base + t * d + i) + sum[t]);
        // The same place in the next tile, which follows in memory: rows are too short for the hardware to run ahead.
        __builtin_prefetch(base + (kTokens + t) * d + i);
      }
    }
  };
  int64_t i = begin;
  for (; i + kVec <= end; i += kVec) {
    columns(
        i, [](const Y* p) { return load(p); }, [](const float* p) { return load(p); },
        [](Y* p, Vec v) { store(p, v); });
  }
  if (i < end) {
    const int rest = static_cast<int>(end - i);
    columns(
        i, [rest](const Y* p) { return load(p, rest); }, [rest](const float* p) { return load(p, rest); },
        [rest](Y* p, Vec v) { store(p, v, rest); });
  }
}

// Lane l of the v-th of kRank vectors of a row-major (kVec, kRank) block lies in row (v kVec + l) / kRank.
template <int kRank>
struct RowOfLane {
  int32_t row[kRank][kVec];
  constexpr RowOfLane() : row() {
    for (int v = 0; v < kRank; ++v) {
      for (int l = 0; l < kVec; ++l) row[v][l] = (v * kVec + l) / kRank;
    }
  }
};

// value[row[l]] in lane l.
ADAZETA_HD Vec spread(Vec value, const int32_t* row) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
  return _mm512_permutexvar_ps(_mm512_loadu_si512(row), value);
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(value, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
#else
  float from[kVec], to[kVec];
  store(from, value);
  for (int l = 0; l < kVec; ++l) to[l] = from[row[l]];
  return load(to);
#endif
}

template <class X, int kRank>
void project_row_part(const X* x, const float* left, int64_t d, float* h) {
  static constexpr RowOfLane<kRank> kRows{};
  Vec sum[kRank] = {};
  int64_t i = 0;
  for (; i + kVec <= d; i += kVec) {
    const Vec value = load(x + i);
    for (int v = 0; v < kRank; ++v) {
      sum[v] = VecMath::fma(spread(value, kRows.row[v]), load(left + i * kRank + v * kVec), sum[v]);
    }
  }
  if (i < d) {
    const Vec value = load(x + i, static_cast<int>(d - i));
    const int rest = static_cast<int>(d - i) * kRank;
    for (int v = 0; v < kRank && v * kVec < rest; ++v) {
      const int n = rest - v * kVec < kVec ? rest - v * kVec : kVec;
      sum[v] = VecMath::fma(spread(value, kRows.row[v]), load(left + i * kRank + v * kVec, n), sum[v]);
    }
  }
  float lanes[kRank * kVec];
  for (int v = 0; v < kRank; ++v) store(lanes + v * kVec, sum[v]);
  for (int j = 0; j < kRank; ++j) {
    float total = lanes[j];
    for (int l = 1; l < kVec; ++l) total += lanes[l * kRank + j];
    h[j * kTokens] = total;
  }
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// Lane l of column j of a row-major (kVec, kRank) block is element l kRank + j of the block: `lane` is its place in a
// pair of vectors, and `pair[p][j]` has a bit for each lane that lies in the p-th pair.
template <int kRank>
struct ColumnOfBlock {
  static constexpr int kPairs = (kRank + 1) / 2;
  int32_t lane[kRank][kVec];
  uint16_t pair[kPairs][kRank];
  constexpr ColumnOfBlock() : lane(), pair() {
    for (int j = 0; j < kRank; ++j) {
      for (int l = 0; l < kVec; ++l) {
        const int element = l * kRank + j;
        lane[j][l] = element % (2 * kVec);
        pair[element / (2 * kVec)][j] |= static_cast<uint16_t>(1u << l);
      }
    }
  }
};

// The first rows of left turned, as many whole blocks as there are; returns how many rows.
template <int kRank>
int64_t turn_blocks(const float* left, int64_t d, float* panel) {
  static constexpr ColumnOfBlock<kRank> kFrom{};
  const int64_t pitch = panel_pitch(d);
  int64_t i = 0;
  for (; i + kVec <= d; i += kVec) {
    Vec block[2 * kFrom.kPairs] = {};
    for (int v = 0; v < kRank; ++v) block[v] = load(left + i * kRank + v * kVec);
    for (int j = 0; j < kRank; ++j) {
      const __m512i lane = _mm512_loadu_si512(kFrom.lane[j]);
      Vec column{};
      for (int p = 0; p < kFrom.kPairs; ++p) {
        const Vec found = _mm512_permutex2var_ps(block[2 * p], lane, block[2 * p + 1]);
        column = _mm512_mask_mov_ps(column, kFrom.pair[p][j], found);
      }
      store(panel + j * pitch + i, column);
    }
  }
  return i;
}
#else
template <int kRank>
int64_t turn_blocks(const float*, int64_t, float*) {
  return 0;
}
#endif

}  // namespace

void turn(const float* left, int64_t d, int rank, float* panel) {
  const int64_t pitch = panel_pitch(d);
  int64_t done = 0;
  if (rank <= kMaxRowRank) {
    with_number<kMaxRowRank>(rank, [&](auto ranks) { done = turn_blocks<ranks.value>(left, d, panel); });
  }
  for (int j = 0; j < rank; ++j) {
    for (int64_t i = done; i < d; ++i) panel[j * pitch + i] = left[i * rank + j];
    for (int64_t i = d; i < pitch; ++i) panel[j * pitch + i] = 0.0f;
  }
}

void project(Dtype dtype, const void* x, int tokens, const float* panel, int64_t d, int rank, float* h,
             const void* next) {
  const int parts = (rank + kMaxPart - 1) / kMaxPart;
  with_dtype(dtype, [&](auto type) {
    using X = decltype(type);
    const X* rows = static_cast<const X*>(x);
    for (int part = 0; part < parts; ++part) {
      const int first = rank * part / parts, count = rank * (part + 1) / parts - first;
      const float* columns = panel + first * panel_pitch(d);
      const X* result = part == 0 ? static_cast<const X*>(next) : nullptr;
      with_number<kMaxPart>(count, [&](auto ranks) {
        Vec total[kTokens][kMaxPart] = {};
        for_columns(d, [&](int64_t begin, int64_t end) {
          const auto group = [&](auto size, int t) {
            project_part<X, size.value, ranks.value>(rows + t * d, columns, d, begin, end, total + t,
                                                     result == nullptr ? nullptr : result + t * d);
          };
          int t = 0;
          for (; t + kGroup <= tokens; t += kGroup) group(Number<kGroup>{}, t);
          for (; t < tokens; ++t) group(Number<1>{}, t);
        });
        for (int j = 0; j < ranks.value; ++j) {
          for (int t = 0; t < kTokens; t += 4) {
            lane_sums(h + (first + j) * kTokens + t, total[t][j], total[t + 1][j], total[t + 2][j], total[t + 3][j]);
          }
        }
      });
    }
  });
}

void project_row(Dtype dtype, const void* x, const float* left, int64_t d, int rank, float* h) {
  with_dtype(dtype, [&](auto type) {
    using X = decltype(type);
    with_number<kMaxRowRank>(
        rank, [&](auto ranks) { project_row_part<X, ranks.value>(static_cast<const X*>(x), left, d, h); });
  });
}

void expand(Dtype dtype, const void* base, void* y, int tokens, const float* g, const float* right, int64_t d, int rank,
            const float* bias, float scale) {
  with_dtype(dtype, [&](auto type) {
    using Y = decltype(type);
    const auto run = [&](auto ranks) {
      const Y* from = static_cast<const Y*>(base);
      Y* to = static_cast<Y*>(y);
      for_columns(d, [&](int64_t begin, int64_t end) {
        const auto group = [&](auto count, int t) {
          expand_part<Y, count.value, ranks.value>(from == nullptr ? nullptr : from + t * d, to + t * d, g + t, right,
                                                   d, begin, end, rank, bias, scale);
        };
        int t = 0;
        for (; t + kGroup <= tokens; t += kGroup) group(Number<kGroup>{}, t);
        for (; t < tokens; ++t) group(Number<1>{}, t);
      });
    };
    rank <= kMaxPart ? with_number<kMaxPart>(rank, run) : run(Number<0>{});
  });
}

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
