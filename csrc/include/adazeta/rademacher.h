// Random words to signs: one bit per element (docs/perturbation-spec.md, section 4).
#pragma once

#include <cstdint>

#include "adazeta/fma.h"
#include "adazeta/macros.h"

namespace adazeta {

// +1 for a set bit, -1 for a clear one; bit 0 is the least significant.
ADAZETA_HD float sign_of_bit(uint32_t word, int bit) {
  return bit_cast<float>(0xbf800000u ^ (((word >> bit) & 1u) << 31));
}

}  // namespace adazeta
