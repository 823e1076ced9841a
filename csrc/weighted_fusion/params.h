// How up to three maps are fused into one, and the arguments of weighted_fusion, checked by bind.cpp; the op is
// documented in effdet_kernels/ops/weighted_fusion/op.py.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/map.h"

namespace effdet {

constexpr int kMaxFused = 3;

// The order of effdet_kernels/ops/weighted_fusion/op.py's RESAMPLE.
enum Resample : int { kIdentity = 0, kNearest = 1, kBilinear = 2, kMaxPool = 3 };

struct Fusion {
  std::int64_t count;
  int resample[kMaxFused];
  const void* shares;           // [count] of the accumulator's type; null: the one map as it is
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
    f(fusion.shares), f(y);
  }
};

EFFDET_PER_ISA(Status, weighted_fusion, (const WeightedFusionParams&, int threads))

}  // namespace effdet
