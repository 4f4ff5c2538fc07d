// low_rank_linear: y = base + scale (x A) B with the factors of each probe.
#include "low_rank.h"

namespace adazeta {
namespace ADAZETA_LEVEL {

void low_rank_linear(const LowRankParams& p) { low_rank(p); }

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
