// How up to three maps are fused into one, and the arguments of weighted_fusion, checked by bind.cpp; the op is
// documented in effdet_kernels/ops/weighted_fusion/op.py.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/map.h"
#include "common/resample_codes.h"

namespace effdet {

struct Fusion {
  std::int64_t count;
  int resample[kMaxFused];
  const void* weight;  // [count] of the accumulator's type; null with kSum
  int method;
  std::int64_t pool_left, pool_top;
};

struct WeightedFusionParams {
  Map x[kMaxFused];  // [batch, H_i, W_i, channels]
  Fusion fusion;
  void* y;  // [batch, height, width, channels], dense
  std::int64_t batch, channels, height, width;
  int dtype, act;

  template <typename F>
  void pointers(F&& f) {
    for (Map& map : x) f(map.data);
    f(fusion.weight), f(y);
  }
};

// Of y = sum of share[i] * resampled x[i], with the gradient of y: those of each x and of the weight.
struct FusionGradientParams {
  Map x[kMaxFused];
  Map grad;  // of y
  Fusion fusion;
  void* grad_x[kMaxFused];  // [batch, H_i, W_i, channels], dense, of the accumulator's type; or null
  void* grad_weight;        // [count] of the accumulator's type; null without a weight
  void* partial;            // workspace [batch, vectors of channels, count] of double
  std::int64_t batch, channels;
  int dtype;

  template <typename F>
  void pointers(F&& f) {
    for (int i = 0; i < kMaxFused; ++i) f(x[i].data), f(grad_x[i]);
    f(grad.data), f(fusion.weight), f(grad_weight), f(partial);
  }
};

EFFDET_PER_ISA(Status, weighted_fusion, (const WeightedFusionParams&, int threads))
EFFDET_PER_ISA(Status, weighted_fusion_gradient, (const FusionGradientParams&, int threads))

}  // namespace effdet
