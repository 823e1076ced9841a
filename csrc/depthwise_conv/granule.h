// What a warp of the depthwise kernels on matrix units makes, and how it lies in shared memory.
#pragma once

#include "cuda/platform.h"

namespace effdet::cuda {

constexpr int kGranule = 8;  // channels that a warp makes: 16 bytes

// Distance between pixels in shared memory: an odd number of granules, so that ldmatrix meets no bank twice.
__host__ __device__ constexpr int padded(int granules) {
  return granules | 1;
}

}  // namespace effdet::cuda
