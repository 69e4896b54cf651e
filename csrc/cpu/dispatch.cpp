// Selects the instruction set of the CPU kernels, once per process, by querying the CPU.
#include <cstdlib>
#include <cstring>

#include "isa_table.h"

namespace fedspine {
namespace {

const IsaTable& select() {
#if defined(__x86_64__)
  const char* limit = std::getenv("FEDSPINE_ISA");
  const bool only_baseline = limit != nullptr && std::strcmp(limit, "baseline") == 0;
  const bool only_avx2 = limit != nullptr && std::strcmp(limit, "avx2") == 0;
  __builtin_cpu_init();
  if (!only_baseline && !only_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return isa_avx512;
  }
  if (!only_baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return isa_avx2;
#endif
  return isa_baseline;
}

}  // namespace

const IsaTable& isa_table() {
  static const IsaTable& selected = select();
  return selected;
}

std::string cpu_isa() {
  return isa_table().name;
}

}  // namespace fedspine
