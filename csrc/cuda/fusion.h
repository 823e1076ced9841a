// The weighted sum of one to three maps, resampled on load: what weighted_fusion stores, and what other ops convolve.
// effdet_kernels/ops/weighted_fusion has the mathematics.
//
// A kernel gets FusedMaps by value, takes fusion_shares once per thread and then fused_vector of any pixel.
#pragma once

#include <type_traits>

#include "cuda/activation.h"
#include "cuda/fused_maps.h"
#include "cuda/memory.h"
#include "cuda/number.h"

namespace effdet::cuda {

// Normalised weights -------------------------------------------------------------------------------------------------

__device__ __forceinline__ float fusion_weight(const FusedMaps& maps, int i) {
  switch (maps.weight_dtype) {
    case kFloat32:
      return static_cast<const float*>(maps.weight)[i];
    case kFloat64:
      return static_cast<float>(static_cast<const double*>(maps.weight)[i]);
    case kBFloat16:
      return widen(static_cast<const BFloat16*>(maps.weight)[i]);
    default:
      return widen(static_cast<const Float16*>(maps.weight)[i]);
  }
}

struct Shares {
  float values[kMaxFused];  // 0 beyond the maps
  float total;              // what the weights' relu, or exponentials, were divided by
};

// The normalised weights a_i.
__device__ __forceinline__ Shares fusion_shares(const FusedMaps& maps) {
  Shares shares{};
  if (maps.method == kSum) {
    EFFDET_UNROLL
    for (int i = 0; i < kMaxFused; ++i) shares.values[i] = i < maps.count ? 1.0f : 0.0f;
    shares.total = 1.0f;
    return shares;
  }
  float largest = 0.0f;
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    if (i < maps.count) {
      shares.values[i] = fusion_weight(maps, i);
      largest = i == 0 || shares.values[i] > largest ? shares.values[i] : largest;
    }
  }
  shares.total = maps.method == kSoftmax ? 0.0f : 1e-4f;
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    if (i < maps.count) {
      float& value = shares.values[i];
      value = maps.method == kSoftmax ? exponential(value - largest) : value < 0.0f ? 0.0f : value;
      shares.total += value;
    }
  }
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) shares.values[i] /= shares.total;
  return shares;
}

// Resampling ---------------------------------------------------------------------------------------------------------

// The larger of each two numbers, NaN if one is; +0 is above -0.
template <typename T>
__device__ __forceinline__ unsigned larger(unsigned a, unsigned b) {
#ifndef EFFDET_EMULATED
  unsigned c;
  if constexpr (sizeof(T) == 4) {
    asm("max.NaN.f32 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  }
  return c;
#else
  const auto of = [](float x, float y) {
    if (x == y) return __uint_as_float(__float_as_uint(x) & __float_as_uint(y));
    return x != x ? x : y != y || x < y ? y : x;
  };
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(of(__uint_as_float(a), __uint_as_float(b)));
  } else {
    const float2 x = widen_pair<T>(a), y = widen_pair<T>(b);
    return narrow_pair<T>(of(x.x, y.x), of(x.y, y.y));
  }
#endif
}
template <typename T>
__device__ __forceinline__ uint4 larger(const uint4& a, const uint4& b) {
  return {larger<T>(a.x, b.x), larger<T>(a.y, b.y), larger<T>(a.z, b.z), larger<T>(a.w, b.w)};
}

// `place`, or the nearest that a map has. A pool's window that has one outside has the nearest one inside too: the
// largest is the same, without a mask.
__device__ __forceinline__ int inside(int place, std::int64_t size) {
  return max(0, min(place, static_cast<int>(size) - 1));
}

// The maximum of the window of pixel (h, w), not yet widened. `x` is the image's first pixel, at the vector's channel;
// so it is below.
template <typename T>
__device__ __forceinline__ uint4 pooled_vector(const FusedMaps& maps, const Map& map, const T* x, int h, int w) {
  const int top = 2 * h - maps.pool_top, left = 2 * w - maps.pool_left;
  uint4 best{};
  EFFDET_UNROLL
  for (int i = 0; i < 3; ++i) {
    const T* const row = x + inside(top + i, map.height) * map.row_stride;
    EFFDET_UNROLL
    for (int j = 0; j < 3; ++j) {
      const uint4 value = load<uint4>(row + inside(left + j, map.width) * map.pixel_stride);
      best = i + j == 0 ? value : larger<T>(best, value);
    }
  }
  return best;
}

// The pixel, of `size`, that pixel `place` of `of` comes from, as torch's interpolate has it.
__device__ __forceinline__ int nearest_place(int place, int size, int of) {
  const float ratio = static_cast<float>(size) / static_cast<float>(of);
  return min(static_cast<int>(static_cast<float>(place) * ratio), size - 1);
}

// The two pixels, of `size`, around the centre of pixel `place` of `of`; size * of is below 2^31.
struct Between {
  int first, second;
  float weight;  // of the second
};
__device__ __forceinline__ Between between(int place, int size, int of) {
  // In units of 1 / (2 of).
  const unsigned at = 2u * static_cast<unsigned>(place) * static_cast<unsigned>(size) + static_cast<unsigned>(size);
  const unsigned step = 2u * static_cast<unsigned>(of), half = static_cast<unsigned>(of);
  const unsigned centre = at > half ? at - half : 0u;
  const unsigned first = centre / step;
  Between found;
  found.first = static_cast<int>(first);
  found.second = min(found.first + 1, size - 1);
  found.weight = static_cast<float>(centre - first * step) / static_cast<float>(step);
  return found;
}

template <typename T>
__device__ __forceinline__ void bilinear_vector(const FusedMaps& maps, const Map& map, const T* x, int h, int w,
                                                float (&values)[kVector<T>]) {
  const Between down = between(h, static_cast<int>(map.height), maps.height);
  const Between right = between(w, static_cast<int>(map.width), maps.width);
  EFFDET_UNROLL
  for (int i = 0; i < 2; ++i) {
    const T* const row = x + (i == 0 ? down.first : down.second) * map.row_stride;
    const float share = i == 0 ? 1.0f - down.weight : down.weight;
    float first[kVector<T>], second[kVector<T>];
    widen_vector<T>(load<uint4>(row + right.first * map.pixel_stride), first);
    widen_vector<T>(load<uint4>(row + right.second * map.pixel_stride), second);
    EFFDET_UNROLL
    for (int k = 0; k < kVector<T>; ++k) {
      const float mixed = first[k] * (1.0f - right.weight) + second[k] * right.weight;
      values[k] = i == 0 ? mixed * share : values[k] + mixed * share;
    }
  }
}

// The vector that stands for r_i(x_i) at pixel (h, w) of the result, of every resampling but kBilinear.
template <typename T>
__device__ __forceinline__ uint4 taken_vector(const FusedMaps& maps, int i, const T* x, int h, int w) {
  const Map& map = maps.x[i];
  if (maps.resample[i] == kMaxPool) return pooled_vector<T>(maps, map, x, h, w);
  if (maps.resample[i] == kHalved) {
    h >>= 1;
    w >>= 1;
  } else if (maps.resample[i] == kNearest) {
    h = nearest_place(h, static_cast<int>(map.height), maps.height);
    w = nearest_place(w, static_cast<int>(map.width), maps.width);
  }
  return load<uint4>(x + h * map.row_stride + w * map.pixel_stride);
}

// The first pixel of an image of map i, at `channel`.
template <typename T>
__device__ __forceinline__ const T* fused_image(const FusedMaps& maps, int i, std::int64_t image, int channel) {
  return static_cast<const T*>(maps.x[i].data) + image * maps.x[i].batch_stride + channel;
}

// r_i(x_i) of all maps, of the channels from `channel`, a multiple of kVector<T>, at pixel (h, w) of the result, which
// has it; 0 beyond the maps. All loads of single pixels are under way before the first is waited for.
template <typename T>
__device__ __forceinline__ void resampled_vectors(const FusedMaps& maps, std::int64_t image, int h, int w, int channel,
                                                  float (&values)[kMaxFused][kVector<T>]) {
  uint4 taken[kMaxFused];
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    taken[i] = uint4{0, 0, 0, 0};
    if (i < maps.count && maps.resample[i] != kBilinear)
      taken[i] = taken_vector<T>(maps, i, fused_image<T>(maps, i, image, channel), h, w);
  }
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    widen_vector<T>(taken[i], values[i]);
    if (i < maps.count && maps.resample[i] == kBilinear)
      bilinear_vector<T>(maps, maps.x[i], fused_image<T>(maps, i, image, channel), h, w, values[i]);
  }
}

// sum_i a_i values[i].
template <int kCount>
__device__ __forceinline__ void weighted_sum(const FusedMaps& maps, const Shares& shares,
                                             const float (&values)[kMaxFused][kCount], float (&sum)[kCount]) {
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    if (i < maps.count) {
      EFFDET_UNROLL
      for (int k = 0; k < kCount; ++k)
        sum[k] = i == 0 ? values[i][k] * shares.values[i] : sum[k] + values[i][k] * shares.values[i];
    }
  }
}

// sum_i a_i r_i(x_i), before an activation; arguments as resampled_vectors has them.
template <typename T>
__device__ __forceinline__ void fused_vector(const FusedMaps& maps, const Shares& shares, std::int64_t image, int h,
                                             int w, int channel, float (&sum)[kVector<T>]) {
  float values[kMaxFused][kVector<T>];
  resampled_vectors<T>(maps, image, h, w, channel, values);
  weighted_sum(maps, shares, values, sum);
}

}  // namespace effdet::cuda
