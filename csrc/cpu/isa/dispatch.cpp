#include <cstdlib>
#include <cstring>

#include "cacovid/ops.h"
#include "isa/hot_loops.h"
#include "isa/row_loops.h"

namespace cacovid::cpu {
namespace {

const HotLoops& choose() {
#if defined(__x86_64__)
  const char* cap = std::getenv("CACOVID_CPU_ISA");
  const bool allow_avx2 = cap == nullptr || std::strcmp(cap, "baseline") != 0;
  const bool allow_avx512 = allow_avx2 && (cap == nullptr || std::strcmp(cap, "avx2") != 0);
  if (allow_avx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("bmi2")) {
    return avx512_loops;
  }
  if (allow_avx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c")) {
    return avx2_loops;
  }
#endif
  return baseline_loops;
}

}  // namespace

const HotLoops& hot_loops() {
  static const HotLoops& chosen = choose();
  return chosen;
}

const RowLoops& row_loops() { return *hot_loops().rows; }

const char* isa_name() { return hot_loops().name; }

}  // namespace cacovid::cpu
