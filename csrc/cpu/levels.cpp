// Which instruction set levels this CPU can run.
#include "levels.h"

#include <cstring>

namespace adazeta {
namespace {

struct Level {
  Kernels kernels;
  bool (*runs)();
};

bool always() { return true; }

#if defined(ADAZETA_X86_LEVELS)
bool has_v3() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2");
}

bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_v4_bf16() { return has_v4() && __builtin_cpu_supports("avx512bf16"); }
#endif

// `name` has the ops whose bits are the same on all levels, and tt_factors; `tokens` has those on tokens.
#define ADAZETA_LEVEL_KERNELS(label, name, tokens) \
  {label,                                          \
   name::fill_normal,                              \
   name::perturb,                                  \
   name::perturb_rows,                             \
   name::tt_factors,                               \
   tokens::tt_adapter,                             \
   tokens::tt_linear,                              \
   tokens::low_rank_linear}

const Level kLevels[] = {
#if defined(ADAZETA_X86_LEVELS)
    {ADAZETA_LEVEL_KERNELS("v4_bf16", level_v4, level_v4_bf16), has_v4_bf16},
    {ADAZETA_LEVEL_KERNELS("v4", level_v4, level_v4), has_v4},
    {ADAZETA_LEVEL_KERNELS("v3", level_v3, level_v3), has_v3},
#endif
    {ADAZETA_LEVEL_KERNELS("default", level_default, level_default), always},
};

}  // namespace

const Kernels* find_kernels(const char* name) {
  for (const Level& level : kLevels) {
    if ((strcmp(name, "auto") == 0 || strcmp(name, level.kernels.name) == 0) && level.runs()) return &level.kernels;
  }
  return nullptr;
}

int supported_kernels(const Kernels** out, int capacity) {
  int n = 0;
  for (const Level& level : kLevels) {
    if (n < capacity && level.runs()) out[n++] = &level.kernels;
  }
  return n;
}

}  // namespace adazeta
