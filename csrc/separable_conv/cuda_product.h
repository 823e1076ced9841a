// The pointwise half of separable_conv: a warp's sums, 16 pixels of kTiles rows by up to 64 output channels, and what
// becomes of them.
#pragma once

#include "cuda/activation.h"
#include "separable_conv/cuda_depthwise.h"

namespace effdet::cuda {

// A thread's results of a group: kChannels channels, channel(i), of kPixels pixels of each row, column(pixel).
template <typename T, int kTiles>
struct Product {
  static constexpr int kPixels = 2, kChannels = 8, kPair = 2;
  static constexpr int kStep = 2;  // 16-byte vectors of input channels that go at a time
  Products sums[2][kTiles][4];     // by group

  __device__ __forceinline__ void clear() {
    EFFDET_UNROLL
    for (int i = 0; i < 8 * kTiles; ++i) sums[i / 4 / kTiles][i / 4 % kTiles][i % 4] = Products{};
  }

  // Adds the products with `count` vectors of input channels. `pixels`: these of the first pixel, `pitch` apart;
  // `weights`: of the warp's first output channel, `weight_pitch` apart.
  __device__ __forceinline__ void add(const uint4* pixels, int pitch, const uint4* weights, int weight_pitch, int count,
                                      int groups) {
    const uint4* const left = pixels + lane_id() % 16 * pitch + lane_id() / 16;
    const uint4* const right = weights + (lane_id() % 8 + lane_id() / 16 * 8) * weight_pitch + lane_id() / 8 % 2;
    EFFDET_NO_UNROLL
    for (int k = 0; k < count; k += kStep) {
      LeftOperand a[kTiles];
      EFFDET_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) a[tile] = load_matrices<false>(left + tile * kPatchWidth * pitch + k);
      EFFDET_UNROLL
      for (int group = 0; group < 2; ++group) {
        if (group < groups) {
          EFFDET_UNROLL
          for (int j = 0; j < 2; ++j) {
            const LeftOperand b = load_matrices<false>(right + (group * kGroup + 16 * j) * weight_pitch + k);
            EFFDET_UNROLL
            for (int tile = 0; tile < kTiles; ++tile) {
              multiply_add<T>(sums[group][tile][2 * j], a[tile], {b.words[0], b.words[1]});
              multiply_add<T>(sums[group][tile][2 * j + 1], a[tile], {b.words[2], b.words[3]});
            }
          }
        }
      }
    }
  }

  __device__ __forceinline__ float value(int group, int tile, int pixel, int i) const {
    return sums[group][tile][i / 2].values[2 * pixel + i % 2];
  }
  static __device__ __forceinline__ int column(int pixel) { return lane_id() / 4 + 8 * pixel; }
  // With `wide` the 8 channels lie next to each other: then row r of a group of weights in shared memory is of
  // channel wide_channel(r).
  static __device__ __forceinline__ int channel(int i, bool wide) {
    return lane_id() % 4 * (wide ? 8 : 2) + i / 2 * (wide ? 2 : 8) + i % 2;
  }
  static __device__ __forceinline__ unsigned channel_of_row(unsigned row, bool wide) {
    return wide ? (row & ~30u) | (row & 6u) << 2 | (row & 24u) >> 2 : row;
  }

  // Scale and shift of kPair channels next to each other.
  static __device__ __forceinline__ void load_affine(const float* affine, float (&factors)[2], float (&addends)[2]) {
    const float4 found = load<float4>(affine);
    factors[0] = found.x;
    addends[0] = found.y;
    factors[1] = found.z;
    addends[1] = found.w;
  }

  // Writes the results of a pixel; `y`: its channel(0), which `left` are left from.
  static __device__ __forceinline__ void write(T* y, const float* values, int left, bool wide) {
    if (wide) {
      if (left > 0)
        store(y, uint4{narrow_pair<T>(values[0], values[1]), narrow_pair<T>(values[2], values[3]),
                       narrow_pair<T>(values[4], values[5]), narrow_pair<T>(values[6], values[7])});
      return;
    }
    EFFDET_UNROLL
    for (int i = 0; i < 8; i += 2) {
      if (left % 2 == 0) {
        if (4 * i < left) store(y + 4 * i, narrow_pair<T>(values[i], values[i + 1]));
      } else {
        if (4 * i < left) y[4 * i] = narrow<T>(values[i]);
        if (4 * i + 1 < left) y[4 * i + 1] = narrow<T>(values[i + 1]);
      }
    }
  }
};

// float32, with multiply-adds.
template <>
struct Product<float, 1> {
  static constexpr int kPixels = 4, kChannels = 4, kPair = 1;
  static constexpr int kStep = 1;
  float sums[kPixels][2 * kChannels];

  __device__ __forceinline__ void clear() {
    EFFDET_UNROLL
    for (int i = 0; i < 32; ++i) sums[i / 8][i % 8] = 0.0f;
  }

  __device__ __forceinline__ void add(const uint4* pixels, int pitch, const uint4* weights, int weight_pitch, int count,
                                      int groups) {
    const uint4* const left = pixels + column(0) * pitch;
    const uint4* const right = weights + channel(0, false) * weight_pitch;
    EFFDET_NO_UNROLL
    for (int k = 0; k < count; ++k) {
      float a[kPixels][4];
      EFFDET_UNROLL
      for (int pixel = 0; pixel < kPixels; ++pixel) widen_vector<float>(left[4 * pixel * pitch + k], a[pixel]);
      EFFDET_UNROLL
      for (int j = 0; j < 2 * kChannels; ++j) {
        if (j < kChannels * groups) {
          float b[4];
          widen_vector<float>(right[8 * j * weight_pitch + k], b);
          EFFDET_UNROLL
          for (int i = 0; i < 16; ++i) sums[i / 4][j] += a[i / 4][i % 4] * b[i % 4];
        }
      }
    }
  }

  __device__ __forceinline__ float value(int group, int, int pixel, int i) const {
    return sums[pixel][kChannels * group + i];
  }
  static __device__ __forceinline__ int column(int pixel) { return lane_id() / 8 + 4 * pixel; }
  static __device__ __forceinline__ int channel(int i, bool) { return lane_id() % 8 + 8 * i; }
  static __device__ __forceinline__ unsigned channel_of_row(unsigned row, bool) { return row; }

  static __device__ __forceinline__ void load_affine(const float* affine, float (&factors)[1], float (&addends)[1]) {
    const float2 found = load<float2>(affine);
    factors[0] = found.x;
    addends[0] = found.y;
  }

  static __device__ __forceinline__ void write(float* y, const float* values, int left, bool) {
    EFFDET_UNROLL
    for (int i = 0; i < kChannels; ++i)
      if (8 * i < left) y[8 * i] = values[i];
  }
};

}  // namespace effdet::cuda
