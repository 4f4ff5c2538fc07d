// tt_linear: y = (x L) R + bias with the factors of each probe.
#include "low_rank.h"

namespace adazeta {
namespace ADAZETA_LEVEL {

void tt_linear(const LowRankParams& p) { low_rank(p); }

}  // namespace ADAZETA_LEVEL
}  // namespace adazeta
