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
#endif

const Level kLevels[] = {
#if defined(ADAZETA_X86_LEVELS)
    {{"v4", level_v4::fill_normal, level_v4::perturb, level_v4::perturb_rows}, has_v4},
    {{"v3", level_v3::fill_normal, level_v3::perturb, level_v3::perturb_rows}, has_v3},
#endif
    {{"default", level_default::fill_normal, level_default::perturb, level_default::perturb_rows}, always},
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
