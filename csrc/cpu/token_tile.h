// The two halves of a low-rank map on a tile of tokens: h = x L, and y = base + (g R + bias).
//
// Narrow values (h, g) are stored rank by rank, kTokens tokens side by side, so that what lies between the halves runs
// with tokens as lanes. What a token gets does not depend on its place in the tile.
#pragma once

#include <cstdint>

#include "adazeta/params.h"

namespace adazeta {
namespace ADAZETA_LEVEL {

constexpr int kTokens = 16;
constexpr int kFewTokens = 8;    // up to so many per probe, turning L costs more than it saves
constexpr int kMaxRowRank = 8;   // of project_row
constexpr int kPanelAlign = 16;  // numbers

inline int64_t panel_pitch(int64_t d) { return (d + kPanelAlign - 1) / kPanelAlign * kPanelAlign; }

inline void* at(const Tokens& t, int64_t element) {
  return t.data == nullptr ? nullptr : static_cast<char*>(t.data) + element * element_size(t.dtype);
}

// panel [rank, panel_pitch(d)] <- left [d, rank] turned, zeros behind.
void turn(const float* left, int64_t d, int rank, float* panel);

// h [rank, kTokens] <- x [tokens, d] L, with L turned. `next`, unless null, is where a result of the shape of x will be
// written: its cache lines are fetched meanwhile.
void project(Dtype dtype, const void* x, int tokens, const float* panel, int64_t d, int rank, float* h,
             const void* next = nullptr);

// The same for one token (lane 0 of h) and left [d, rank] as it is; rank at most kMaxRowRank.
void project_row(Dtype dtype, const void* x, const float* left, int64_t d, int rank, float* h);

// y [tokens, d] <- base + (g R + scale bias), g [rank, kTokens], right [rank, d]; base and bias may be null.
void expand(Dtype dtype, const void* base, void* y, int tokens, const float* g, const float* right, int64_t d, int rank,
            const float* bias, float scale);

// Whether to take project_row.
inline bool row_by_row(int64_t tokens, int rank) { return tokens <= kFewTokens && rank <= kMaxRowRank; }

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
