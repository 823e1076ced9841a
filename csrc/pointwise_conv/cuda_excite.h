// Squeeze-excite inside the kernel that its gates are for: every block makes those of its image, from the sums that the
// blocks of a depthwise convolution left.
#pragma once

#include "cuda/activation.h"
#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/number.h"
#include "pointwise_conv/cuda.h"

namespace effdet::cuda {

template <typename W>
__device__ __forceinline__ float2 load_pair(const W* at) {
  if constexpr (sizeof(W) == 4) {
    return load<float2>(at);
  } else {
    return widen_pair<W>(load<unsigned>(at));
  }
}

// The sum over `kLanes` threads next to each other, of which each has it.
template <int kLanes>
__device__ __forceinline__ float sum_of_lanes(float value) {
  EFFDET_UNROLL
  for (int bits = kLanes / 2; bits > 0; bits /= 2) value += __shfl_xor_sync(kAll, value, bits);
  return value;
}

// gates = gate(expand_weight act(reduce_weight means + reduce_bias) + expand_bias) of one image, then zeros up to a
// multiple of 16. `hidden` has room for e.reduced. Weights are of W; `channels` is a multiple of a vector of them.
template <typename W, int kThreads>
__device__ __forceinline__ void excite(const Excite& e, std::int64_t image, int channels, float* gates, float* hidden) {
  constexpr int kWarps = kThreads / kWarp;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const float* const parts = e.parts + image * e.part_count * channels;
  for (int c = thread; c < channels; c += kThreads) {  // the means lie where gates will
    float sum = 0.0f;
    for (int i = 0; i < e.part_count; ++i) sum += parts[static_cast<std::int64_t>(i) * channels + c];
    gates[c] = sum / e.pixels;
  }
  __syncthreads();
  const W* const reduce_weight = static_cast<const W*>(e.reduce_weight);
  constexpr int kRows = 4;  // of a warp at once: loads in flight are what this takes its time by
  for (int first = warp_id() * kRows; first < e.reduced; first += kWarps * kRows) {
    float sums[kRows] = {};
    for (int c = lane * kVector<W>; c < channels; c += kWarp * kVector<W>) {
      uint4 vectors[kRows];
      EFFDET_UNROLL
      for (int i = 0; i < kRows; ++i)  // beyond the last row it is that once more
        vectors[i] = load<uint4>(reduce_weight + min(first + i, e.reduced - 1) * channels + c);
      EFFDET_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float weights[kVector<W>];
        widen_vector<W>(vectors[i], weights);
        EFFDET_UNROLL
        for (int k = 0; k < kVector<W>; ++k) sums[i] += gates[c + k] * weights[k];
      }
    }
    EFFDET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      sums[i] =
          sum_of_lanes<kWarp>(sums[i]) + widen(static_cast<const W*>(e.reduce_bias)[min(first + i, e.reduced - 1)]);
    }
    activate<kAny>(sums, e.act);
    EFFDET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if (lane == i && first + i < e.reduced) hidden[first + i] = sums[i];
    }
  }
  __syncthreads();
  constexpr int kLanes = 8;     // of a channel, so that what a warp reads lies together
  constexpr int kChannels = 8;  // of a lane at once, as many apart as a warp has
  constexpr int kTogether = kWarp / kLanes * kChannels;
  const W* const expand_weight = static_cast<const W*>(e.expand_weight);
  const int padded = divided(channels, 16) * 16, own = lane % kLanes;
  for (int first = warp_id() * kTogether + lane / kLanes; first < padded; first += kWarps * kTogether) {
    float sums[kChannels] = {};
    if (e.reduced % 2 == 0) {
      for (int r = 2 * own; r < e.reduced; r += 2 * kLanes) {
        const float2 values = load<float2>(hidden + r);
        EFFDET_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          const int c = min(first + i * (kWarp / kLanes), channels - 1);
          const float2 weights = load_pair(expand_weight + c * e.reduced + r);
          sums[i] += values.x * weights.x;
          sums[i] += values.y * weights.y;
        }
      }
    } else {
      for (int r = own; r < e.reduced; r += kLanes) {
        EFFDET_UNROLL
        for (int i = 0; i < kChannels; ++i) {
          const int c = min(first + i * (kWarp / kLanes), channels - 1);
          sums[i] += hidden[r] * widen(expand_weight[c * e.reduced + r]);
        }
      }
    }
    EFFDET_UNROLL
    for (int i = 0; i < kChannels; ++i) {
      sums[i] = sum_of_lanes<kLanes>(sums[i]);
      const int c = first + i * (kWarp / kLanes);
      if (own == i && c < padded) {
        float gate = 0.0f;
        if (c < channels) {
          gate = sums[i] + widen(static_cast<const W*>(e.expand_bias)[c]);
          gate = e.hard ? clamped6(gate + 3.0f) * (1.0f / 6.0f) : sigmoid(gate);
        }
        gates[c] = gate;
      }
    }
  }
}

}  // namespace effdet::cuda
