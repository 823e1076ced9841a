// How weighted_fusion brings maps to the size of the result and weighs them, and how many there are at most.
#pragma once

namespace effdet {

constexpr int kMaxFused = 3;

// The order of effdet_kernels/ops/weighted_fusion/op.py's RESAMPLE.
enum Resample : int { kIdentity = 0, kNearest = 1, kBilinear = 2, kMaxPool = 3 };

// The order of its METHODS: how weights are normalised; kSum has none.
enum FusionMethod : int { kFastAttention, kSoftmax, kSum, kFusionMethods };

}  // namespace effdet
