#include "common/isa.h"

#include <atomic>

namespace effdet {
namespace {

bool has(int isa) {
#if EFFDET_X86
  switch (isa) {
    case kPortable:
      return true;
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case kAvx512:
      return has(kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case kAvx512Bf16:
      return has(kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == kPortable;
#endif
}

int best() {
  int isa = kAvx512Bf16;
  while (!has(isa)) --isa;
  return isa;
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{best()};
  return isa;
}

}  // namespace

Isa current_isa() {
  return static_cast<Isa>(chosen().load(std::memory_order_relaxed));
}

bool set_isa(int isa) {
  if (isa < kPortable || isa > kAvx512Bf16 || !has(isa)) return false;
  chosen() = isa;
  return true;
}

}  // namespace effdet
