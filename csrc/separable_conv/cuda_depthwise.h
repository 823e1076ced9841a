// The depthwise half of separable_conv in shared memory: a patch of pixels, 3x3 taps, stride 1. A warp makes all rows
// of its channels. In place, row r of the result takes the place of row r of the patch, which no later row needs.
#pragma once

#include "cuda/matrix.h"
#include "separable_conv/cuda.h"

namespace effdet::cuda {

constexpr int kTaps = 9;
constexpr int kPatchWidth = kTileWidth + 2;

// Whether 0 <= place < size.
__device__ __forceinline__ bool within(int place, int size) {
  return static_cast<unsigned>(place) < static_cast<unsigned>(size);
}

// The sum of the window whose first pixel's vector is `corner`, tap by tap; kFlipped: the last tap first.
template <bool kFlipped, typename T>
__device__ __forceinline__ float sum_of_taps(const uint4* corner, int pitch, int channel, const T* taps) {
  float sum = 0.0f;
  EFFDET_NO_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    const T* pixel = reinterpret_cast<const T*>(corner + (tap / 3 * kPatchWidth + tap % 3) * pitch);
    sum += widen(pixel[channel]) * widen(taps[channel * kTaps + (kFlipped ? kTaps - 1 - tap : tap)]);
  }
  return sum;
}

// 16-bit numbers, 8 channels: a row of taps is a product with two diagonal matrices, one above the other, for columns 0
// and 1, and one of half the depth for column 2. `patch`: the channels' vector of the first pixel; `taps` [8, 9];
// `result`: where that of the first pixel goes, in rows of `width` pixels, `result_pitch` apart.
template <typename T, int kRows, bool kFlipped = false>
__device__ __forceinline__ void convolve(const uint4* patch, int pitch, const T* taps, uint4* result, int result_pitch,
                                         int width) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  // Column g of a diagonal has its weight in row g, which is of the threads with t = g / 2.
  const auto diagonal = [&](int i, int j) {
    unsigned bits = 0;
    const int tap = kFlipped ? kTaps - 1 - (3 * i + j) : 3 * i + j;
    if (t == g / 2) bits = taps[g * kTaps + tap].bits;
    return bits << 16 * (g % 2);
  };
  RightOperand beside[3];
  EFFDET_UNROLL
  for (int i = 0; i < 3; ++i) beside[i] = {diagonal(i, 0), diagonal(i, 1)};
  const unsigned last[3] = {diagonal(0, 2), diagonal(1, 2), diagonal(2, 2)};

  struct Rows {                  // two of the patch
    LeftOperand left[2], right;  // columns 0 and 1 of each; column 2 of both
  };
  const uint4* const left = patch + (lane_id() % 16 + lane_id() / 16) * pitch;
  const uint4* const right = patch + (lane_id() % 16 + 2 + lane_id() / 16 * kPatchWidth) * pitch;
  const auto load_rows = [&](int r) {
    Rows found;
    EFFDET_UNROLL
    for (int i = 0; i < 2; ++i) found.left[i] = load_matrices<false>(left + (r + i) * kPatchWidth * pitch);
    found.right = load_matrices<false>(right + r * kPatchWidth * pitch);
    return found;
  };

  Products sums[kRows];
  Rows rows = load_rows(0);
  EFFDET_UNROLL
  for (int r = 0; r <= kRows; r += 2) {
    Rows next{};
    if (r < kRows) {
      next = load_rows(r + 2);
      sums[r] = sums[r + 1] = Products{};
    }
    EFFDET_UNROLL
    for (int k = 0; k < 2; ++k) {
      // Of the row r + k: columns 0 and 1, then column 2, in the sums of three rows, the oldest first.
      EFFDET_UNROLL
      for (int i = 2; i >= 0; --i)
        if (r + k - i >= 0 && r + k - i < kRows) multiply_add<T>(sums[r + k - i], rows.left[k], beside[i]);
      EFFDET_UNROLL
      for (int i = 2; i >= 0; --i) {
        if (r + k - i >= 0 && r + k - i < kRows)
          multiply_add<T>(sums[r + k - i], rows.right.words[2 * k], rows.right.words[2 * k + 1], last[i]);
      }
    }
    if (r > 0) {
      float check = sums[r - 2].values[0];
      EFFDET_UNROLL
      for (int i = 1; i < 8; ++i) check += sums[r - 2 + i / 4].values[i % 4];
      // Zeros of the diagonals times a NaN or an infinity of another channel are NaN: once more, without them.
      if (__any_sync(kAll, !finite(check))) {
        EFFDET_UNROLL
        for (int i = 0; i < 8; ++i)
          sums[r - 2 + i / 4].values[i % 4] = sum_of_taps<kFlipped>(
              patch + ((r - 2 + i / 4) * kPatchWidth + g + i / 2 % 2 * 8) * pitch, pitch, 2 * t + i % 2, taps);
        __syncwarp();
      }
      EFFDET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float (&z)[4] = sums[r - 2 + i / 2].values;
        uint4* const pixel = result + ((r - 2 + i / 2) * width + g + i % 2 * 8) * result_pitch;
        store(reinterpret_cast<unsigned*>(pixel) + t, narrow_pair<T>(z[i % 2 * 2], z[i % 2 * 2 + 1]));
      }
    }
    rows = next;
  }
}

// float32, in place: a thread makes 4 channels of a column; half a warp has the 16 columns. `works`: whether its
// channels exist.
template <int kRows>
__device__ __forceinline__ void convolve(float4* patch, int pitch, const float* taps, bool works) {
  float4* const column = patch + lane_id() % 16 * pitch;
  float sums[kRows][4];
  if (works) {
    float weights[4 * kTaps];
    EFFDET_UNROLL
    for (int i = 0; i < kTaps; ++i) {
      const float4 four = load<float4>(taps + 4 * i);
      weights[4 * i] = four.x;
      weights[4 * i + 1] = four.y;
      weights[4 * i + 2] = four.z;
      weights[4 * i + 3] = four.w;
    }
    EFFDET_UNROLL
    for (int r = 0; r < kRows + 2; ++r) EFFDET_UNROLL
    for (int j = 0; j < 3; ++j) {
      const float4 pixel = column[(r * kPatchWidth + j) * pitch];
      const float x[4] = {pixel.x, pixel.y, pixel.z, pixel.w};
      EFFDET_UNROLL
      for (int i = 0; i < 3; ++i) {
        const int row = r - i;
        if (row < 0 || row >= kRows) continue;
        EFFDET_UNROLL
        for (int c = 0; c < 4; ++c) {
          const float tap = weights[c * kTaps + 3 * i + j];
          sums[row][c] = i + j == 0 ? x[c] * tap : sums[row][c] + x[c] * tap;
        }
      }
    }
  }
  __syncwarp();
  if (works) {
    EFFDET_UNROLL
    for (int r = 0; r < kRows; ++r)
      column[r * kPatchWidth * pitch] = float4{sums[r][0], sums[r][1], sums[r][2], sums[r][3]};
  }
}

}  // namespace effdet::cuda
