#include <cstdlib>
#include <string_view>

#include "isa/kernels.h"

namespace mflux {

const Kernels* kernels() {
  static const Kernels* const chosen = [] {
    __builtin_cpu_init();
    const Kernels* best = nullptr;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      best = &avx2_kernels;
      const char* restricted = std::getenv("MFLUX_VAE_NATIVE");
      if (!(restricted && std::string_view(restricted) == "avx2") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
        best = &avx512_kernels;
      }
    }
    return best;
  }();
  return chosen;
}

}  // namespace mflux
