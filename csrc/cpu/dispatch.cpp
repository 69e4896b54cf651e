// Which instruction set runs: decided once, by asking the CPU.
#include <cstdlib>
#include <cstring>

#include "tiles.h"

namespace fedspine {
namespace {

const Tiles& choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("FEDSPINE_ISA");
  const bool only_baseline = limit != nullptr && std::strcmp(limit, "baseline") == 0;
  const bool only_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  __builtin_cpu_init();
  if (!only_baseline && !only_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return tiles_avx512;
  }
  if (!only_baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return tiles_avx2;
#endif
  return tiles_baseline;
}

}  // namespace

const Tiles& tiles() {
  static const Tiles& chosen = choose();
  return chosen;
}

std::string cpu_isa() {
  return tiles().name;
}

}  // namespace fedspine
