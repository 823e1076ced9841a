// Arguments of squeeze_excite and of its backward, checked by bind.cpp; the op is documented in
// effdet_kernels/ops/squeeze_excite/op.py, the mathematics in the README beside it.
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
  void* gates;                // [batch, channels]; forward only
  // Backward only; gradients have the shapes of what they belong to.
  const void* grad;  // of gates
  void* grad_sums;
  void* grad_reduce_weight;
  void* grad_reduce_bias;
  void* grad_expand_weight;
  void* grad_expand_bias;
  void* partial;  // workspace [batch, 2 * reduced + channels]
  std::int64_t batch, channels, reduced, count;
  int dtype, act, hard;  // hard: the gate is hard_sigmoid

  template <typename F>
  void pointers(F&& f) {
    f(sums), f(reduce_weight), f(reduce_bias), f(expand_weight), f(expand_bias), f(gates), f(grad);
    f(grad_sums), f(grad_reduce_weight), f(grad_reduce_bias), f(grad_expand_weight), f(grad_expand_bias), f(partial);
  }
};

EFFDET_PER_ISA(Status, squeeze_excite, (const SqueezeExciteParams&, int threads))
EFFDET_PER_ISA(Status, squeeze_excite_backward, (const SqueezeExciteParams&, int threads))

}  // namespace effdet
