// What the kernels of the backward of weighted_fusion share: addresses, sums over a block for the weights.
#pragma once

#include "cuda/fusion.h"
#include "weighted_fusion/params_cuda.h"
#include "weighted_fusion/places.h"

namespace effdet::cuda {

template <typename T>
__device__ __forceinline__ T* gradient(const FusionGradientParams& p, int i, std::int64_t image, int row, int column,
                                       int channel) {
  const Map& map = p.maps.x[i];
  return static_cast<T*>(p.dx[i]) + ((image * map.height + row) * map.width + column) * p.channels + channel;
}

template <typename T>
__device__ __forceinline__ const T* result_gradient(const FusionGradientParams& p, std::int64_t image, int row,
                                                    int column, int channel) {
  return static_cast<const T*>(p.grad.data) + image * p.grad.batch_stride + row * p.grad.row_stride +
         column * p.grad.pixel_stride + channel;
}

template <typename T>
__device__ __forceinline__ void store_scaled(T* at, const float (&values)[kVector<T>], float scale) {
  float scaled[kVector<T>];
  EFFDET_UNROLL
  for (int k = 0; k < kVector<T>; ++k) scaled[k] = values[k] * scale;
  store(at, narrow_vector<T>(scaled));
}

// Adds up what the threads of a block have, in an order that is always the same; thread 0 has the sums.
// `memory` has room for a number per warp and map.
__device__ __forceinline__ void block_sums(float (&sums)[kMaxFused], float* memory) {
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    EFFDET_UNROLL
    for (int bits = 1; bits < kWarp; bits *= 2) sums[i] += __shfl_xor_sync(kAll, sums[i], bits);
    if (lane_id() == 0) memory[warp_id() * kMaxFused + i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) EFFDET_UNROLL
    for (int i = 0; i < kMaxFused; ++i) sums[i] += memory[warp * kMaxFused + i];
  }
}

__device__ __forceinline__ void store_sums(const FusionGradientParams& p, float (&sums)[kMaxFused], float* memory) {
  if (!p.parts) return;
  block_sums(sums, memory);
  if (threadIdx.x != 0) return;
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i)
    if (i < p.maps.count) p.parts[static_cast<std::int64_t>(blockIdx.x) * p.maps.count + i] = sums[i];
}

template <int kCount>
__device__ __forceinline__ float dot(const float (&a)[kCount], const float (&b)[kCount]) {
  float sum = 0.0f;
  EFFDET_UNROLL
  for (int k = 0; k < kCount; ++k) sum += a[k] * b[k];
  return sum;
}

// Whether the maps are looked at: for the activation's slope or for the weights.
__device__ __forceinline__ bool reads_maps(const FusionGradientParams& p) {
  return p.act != kNone || p.parts;
}

// Where the last map is pooled and the others are read as they are.
int pooled_gradient(const FusionGradientParams& params, void* stream);
std::int64_t pooled_gradient_blocks(const FusionGradientParams& params);

}  // namespace effdet::cuda
