// Arguments of squeeze_excite, checked by bind.cpp; the op is documented in effdet_kernels/ops/squeeze_excite/op.py.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace effdet {

// All tensors are of one type, float or double.
struct SqueezeExciteParams {
  const void* sums;           // [batch, channels]
  const void* reduce_weight;  // [reduced, channels]
  const void* reduce_bias;    // [reduced]
  const void* expand_weight;  // [reduced, channels]: transposed
  const void* expand_bias;    // [channels]
  void* gates;                // [batch, channels]
  std::int64_t batch, channels, reduced, count;
  int dtype, act, hard;  // hard: the gate is hard_sigmoid

  template <typename F>
  void pointers(F&& f) {
    f(sums), f(reduce_weight), f(reduce_bias), f(expand_weight), f(expand_bias), f(gates);
  }
};

EFFDET_PER_ISA(Status, squeeze_excite, (const SqueezeExciteParams&, int threads))

}  // namespace effdet
