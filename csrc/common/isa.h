// Instruction sets. Sources named simd.cpp are compiled once per set, each in a namespace of its own, so that no
// inline function of one set can be linked into the path of another.
#pragma once

#include "common/status.h"

namespace effdet {

enum Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// The best set that this CPU and this build have, or the one that set_isa asked for.
Isa current_isa();

// False when this CPU or this build lacks it.
bool set_isa(int isa);

}  // namespace effdet

#if EFFDET_X86
// Declares `result name arguments` in the namespace of every set that is built.
#define EFFDET_PER_ISA(result, name, arguments) \
  namespace portable {                          \
  result name arguments;                        \
  }                                             \
  namespace avx2 {                              \
  result name arguments;                        \
  }                                             \
  namespace avx512 {                            \
  result name arguments;                        \
  }                                             \
  namespace avx512_bf16 {                       \
  result name arguments;                        \
  }                                             \
  namespace amx {                               \
  result name arguments;                        \
  }
// The function of that name for the current set.
#define EFFDET_FOR_ISA(name)                           \
  (current_isa() == kAmx          ? &amx::name         \
   : current_isa() == kAvx512Bf16 ? &avx512_bf16::name \
   : current_isa() == kAvx512     ? &avx512::name      \
   : current_isa() == kAvx2       ? &avx2::name        \
                                  : &portable::name)
#else
#define EFFDET_PER_ISA(result, name, arguments) \
  namespace portable {                          \
  result name arguments;                        \
  }
#define EFFDET_FOR_ISA(name) (&portable::name)
#endif
