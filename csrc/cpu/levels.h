// Instruction set levels. Every op is compiled once per level (CMakeLists.txt sets ADAZETA_LEVEL and the flags), and
// one of them is chosen when it is called. Whole files rather than target_clones: a test can force a level, intrinsics
// can be used, and it works with every compiler.
#pragma once

#include "adazeta/params.h"

#define ADAZETA_DECLARE_LEVEL(name)            \
  namespace name {                             \
  void fill_normal(const FillNormalParams&);   \
  void perturb(const PerturbParams&);          \
  void perturb_rows(const PerturbRowsParams&); \
  void tt_factors(const TTFactorsParams&);     \
  void tt_adapter(const TTAdapterParams&);     \
  void tt_linear(const LowRankParams&);        \
  void low_rank_linear(const LowRankParams&);  \
  }

namespace adazeta {

ADAZETA_DECLARE_LEVEL(level_default)
#if defined(ADAZETA_X86_LEVELS)
ADAZETA_DECLARE_LEVEL(level_v3)
ADAZETA_DECLARE_LEVEL(level_v4)
ADAZETA_DECLARE_LEVEL(level_v4_bf16)  // only ops on tokens; the others are level_v4's
#endif

struct Kernels {
  const char* name;
  void (*fill_normal)(const FillNormalParams&);
  void (*perturb)(const PerturbParams&);
  void (*perturb_rows)(const PerturbRowsParams&);
  void (*tt_factors)(const TTFactorsParams&);
  void (*tt_adapter)(const TTAdapterParams&);
  void (*tt_linear)(const LowRankParams&);
  void (*low_rank_linear)(const LowRankParams&);
};

// The kernels of the level called `name`, or of the best one when name is "auto"; null when this CPU cannot run them.
const Kernels* find_kernels(const char* name);

// Kernels that this CPU can run, best first; returns how many.
int supported_kernels(const Kernels** out, int capacity);

}  // namespace adazeta
