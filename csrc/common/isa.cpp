#include "common/isa.h"

#include <atomic>
#if EFFDET_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace effdet {
namespace {

#if EFFDET_X86
// Whether the CPU multiplies bf16 tiles and the system lets this process use their registers, which has to be asked
// for once (Linux, Documentation/arch/x86/xstate.rst).
bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kBf16 = 1u << 22;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kTile | kBf16)) != (kTile | kBf16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

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
    case kAmx:
      return has(kAvx512Bf16) && has_tiles();
  }
  return false;
#else
  return isa == kPortable;
#endif
}

int best() {
  int isa = kAmx;
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
  if (isa < kPortable || isa > kAmx || !has(isa)) return false;
  chosen() = isa;
  return true;
}

}  // namespace effdet
