// How weighted_fusion brings a map to the size of the result, and how many maps there are at most.
#pragma once

namespace effdet {

constexpr int kMaxFused = 3;

// The order of effdet_kernels/ops/weighted_fusion/op.py's RESAMPLE.
enum Resample : int { kIdentity = 0, kNearest = 1, kBilinear = 2, kMaxPool = 3 };

}  // namespace effdet
