// Arguments of separable_conv, checked by bind.cpp; the op is documented in effdet_kernels/ops/separable_conv/op.py.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "weighted_fusion/params.h"

namespace effdet {

// One output map: a level of a net.
struct SeparableOutput {
  Map x[kMaxFused];        // what is convolved, or what it is fused from
  const void* dw_weights;  // packed: per vector of channels its kernel * kernel vectors
  const void* pw_weights;  // packed (cpu/gemm.h), of separable_product_dtype
  const void* scale;       // [out_channels] of the accumulator's type, padded to whole vectors
  const void* shift;
  void* y;  // [batch, height, width, out_channels], dense
  std::int64_t height, width, out_channels, kernel;
};

constexpr int kMaxOutputs = 12;  // of one launch

struct SeparableParams {
  SeparableOutput outputs[kMaxOutputs];
  Fusion fusion;
  std::int64_t count, batch, channels;
  int dtype, pre_act, act;

  template <typename F>
  void pointers(F&& f) {
    f(fusion.weight);
    for (std::int64_t i = 0; i < count; ++i) {
      SeparableOutput& o = outputs[i];
      for (Map& map : o.x) f(map.data);
      f(o.dw_weights), f(o.pw_weights), f(o.scale), f(o.shift), f(o.y);
    }
  }
};

// What pw_weights are packed as for maps of `dtype`: the accumulator's type, but bf16 stays bf16 for tile registers.
EFFDET_PER_ISA(int, separable_product_dtype, (int dtype))
EFFDET_PER_ISA(Status, separable_conv, (const SeparableParams&, int threads))

}  // namespace effdet
