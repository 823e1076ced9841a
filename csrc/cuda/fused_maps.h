// The maps of a weighted sum, as kernels that fuse them on load take them (cuda/fusion.h).
#pragma once

#include "common/map.h"
#include "common/resample_codes.h"

namespace effdet::cuda {

// A map of half the size, nearest: what kNearest is turned into where it halves the coordinates.
constexpr int kHalved = kMaxPool + 1;

struct FusedMaps {
  Map x[kMaxFused];         // [batch, H_i, W_i, channels] of one dtype, 16-byte vectors of channels
  int resample[kMaxFused];  // a Resample, or kHalved
  int count, method;
  int height, width;        // of the result
  int pool_left, pool_top;  // padding of kMaxPool, 0 to 2
  const void* weight;       // [count], not normalised; null with kSum
  int weight_dtype;
};

}  // namespace effdet::cuda
