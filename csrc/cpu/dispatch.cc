#include "dispatch.h"

#include <secateur/error.h>

#include <cstdlib>

namespace secateur::cpu {
namespace {

#define SECATEUR_KERNELS(isa) \
  {#isa, panel_##isa, gram_##isa, score_##isa, score_lanes_##isa, eliminate_##isa}

const std::vector<const Kernels*>& runnable() {
  static const std::vector<const Kernels*> tables = [] {
    static const Kernels baseline = SECATEUR_KERNELS(baseline);
    std::vector<const Kernels*> found{&baseline};
#if defined(SECATEUR_HAVE_AVX2) || defined(SECATEUR_HAVE_AVX512)
    __builtin_cpu_init();
#endif
#if defined(SECATEUR_HAVE_AVX2)
    static const Kernels avx2 = SECATEUR_KERNELS(avx2);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2);
#endif
#if defined(SECATEUR_HAVE_AVX512)
    static const Kernels avx512 = SECATEUR_KERNELS(avx512);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("fma")) {
      found.push_back(&avx512);
    }
#endif
#if defined(SECATEUR_HAVE_NEON)
    // Part of every 64-bit ARM.
    static const Kernels neon = SECATEUR_KERNELS(neon);
    found.push_back(&neon);
#endif
    return found;
  }();
  return tables;
}

#undef SECATEUR_KERNELS

const Kernels& choose() {
  const char* forced = std::getenv("SECATEUR_ISA");
  if (forced == nullptr || *forced == '\0') return *runnable().back();
  std::string names;
  for (const Kernels* table : runnable()) {
    if (forced == std::string(table->isa)) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw InvalidArgument("SECATEUR_ISA: expected one of " + names + " on this machine, got '" +
                        forced + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* table : runnable()) names.emplace_back(table->isa);
  return names;
}

}  // namespace secateur::cpu
