// Which instruction set serves this process: the best one that was built and that the processor
// has, capped by REGULARIZERS_ISA.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace regularizers {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

inline Isa best_isa() {
#if defined(REGULARIZERS_WIDE_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Isa::avx2;
  }
#endif
  return Isa::baseline;
}

inline Isa chosen_isa() {
  const Isa best = best_isa();
  const char* cap = std::getenv("REGULARIZERS_ISA");
  if (cap == nullptr || *cap == '\0') {
    return best;
  }
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (std::string(cap) == isa_name(isa)) {
      return isa < best ? isa : best;
    }
  }
  throw std::invalid_argument("REGULARIZERS_ISA must be baseline, avx2 or avx512, got '" +
                              std::string(cap) + "'");
}

}  // namespace regularizers
