// A depthwise convolution on matrix units, as far as a warp has to do with it: eight channels, rows from shared memory.
// The left operand is 16 pixels by 8 channels at two taps next to each other, the right one those taps' weights on two
// diagonals, one above the other. An operand is one ldmatrix, used for all the output rows that the input row is part
// of, whose sums stay in registers.
#pragma once

#include "cuda/activation.h"
#include "cuda/matrix.h"
#include "depthwise_conv/granule.h"

namespace effdet::cuda {

// What is fixed when a kernel is compiled.
template <int kKernel, int kStride>
struct DepthwiseShape {
  static constexpr int kGranules = kKernel == 3 ? 8 : 4;  // at most, of a block, a warp each
  static constexpr int kTiles = kStride == 1 ? 2 : 1;     // of 16 output pixels, that a warp makes at a time
  static constexpr int kColumns = 16 * kTiles;
  static constexpr int kLive = divided(kKernel, kStride);                // output rows that an input row is part of
  static constexpr int kPairs = divided(kKernel, 2);                     // of taps in a row
  static constexpr int kRows = kLive * kStride;                          // input rows of a stage
  static constexpr int kPixels = (kColumns - 1) * kStride + 2 * kPairs;  // of an input row; the last may have weight 0
  static constexpr int kStages = 2;
};

// Where a warp stores, from this thread's first channel on.
template <typename T>
struct OutputRows {
  T* y;  // [out_height, out_width, channels]
  int first_row, rows, first_column, out_width, channels, act;
  bool works;
};

// Walks down the rows of a map; one thread has two of the warp's channels.
template <typename T, int kKernel, int kStride, int kAct>
class MatrixWalk {
  using S = DepthwiseShape<kKernel, kStride>;

 public:
  // `weight` is channel lane / 4's [kKernel, kKernel], `scale` and `shift` (null: 1, 0) this thread's; nothing is read
  // unless it works.
  __device__ __forceinline__ void begin(const T* weight, const float* scale, const float* shift, bool works) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    EFFDET_UNROLL
    for (int i = 0; i < kKernel; ++i) {
      EFFDET_UNROLL
      for (int j = 0; j < 2 * S::kPairs; ++j) {
        // Column g of the diagonal of tap (i, j) has its weight in row g, which is of the threads with t = g / 2.
        unsigned bits = 0;
        if (works && t == g / 2 && j < kKernel) bits = weight[i * kKernel + j].bits;
        weights_[i][j / 2].words[j % 2] = bits << 16 * (g % 2);
      }
    }
    if (works) {
      EFFDET_UNROLL
      for (int i = 0; i < 2; ++i) {
        if (scale) scale_[i] = scale[i];
        if (shift) shift_[i] = shift[i];
      }
    }
    EFFDET_UNROLL
    for (int i = 0; i < S::kLive; ++i) EFFDET_UNROLL
    for (int tile = 0; tile < S::kTiles; ++tile) sums_[i][tile] = Products{};
  }

  // The next kRows input rows, steps `first_step` and on of `steps`; pixels lie `pitch` apart in `rows`. `sum_taps`
  // makes four sums once more, tap by tap: those at (row, column) and (row, column + 8), of both channels.
  template <typename SumTaps>
  __device__ __forceinline__ void stage(const uint4* rows, int pitch, int first_step, int steps,
                                        const OutputRows<T>& out, const SumTaps& sum_taps) {
    // This thread's row of ldmatrix: its lower 16 lanes give the pixels of the first tap, the upper those of the
    // second.
    const uint4* const stage_rows = rows + (lane_id() % 16 * kStride + lane_id() / 16) * pitch;
    EFFDET_UNROLL
    for (int phase = 0; phase < S::kLive; ++phase) {
      const int step = first_step + phase;
      if (step < steps) {
        EFFDET_UNROLL
        for (int tile = 0; tile < S::kTiles; ++tile) sums_[phase][tile] = Products{};
        EFFDET_UNROLL
        for (int q = 0; q < kStride; ++q) {
          const uint4* const row = stage_rows + (phase * kStride + q) * S::kPixels * pitch;
          EFFDET_UNROLL
          for (int tile = 0; tile < S::kTiles; ++tile) {
            EFFDET_UNROLL
            for (int pair = 0; pair < S::kPairs; ++pair) {
              const LeftOperand x = load_matrices<false>(row + (tile * 16 * kStride + 2 * pair) * pitch);
              EFFDET_UNROLL
              for (int d = 0; d < S::kLive; ++d) {  // output rows before the newest
                const int i = d * kStride + q;
                if (i < kKernel) multiply_add<T>(sums_[(phase - d + S::kLive) % S::kLive][tile], x, weights_[i][pair]);
              }
            }
          }
        }
        const int row = out.first_row + step - (S::kLive - 1);  // whose sums are whole
        if (out.works && row >= out.first_row && row < out.first_row + out.rows)
          finish(sums_[(phase + 1) % S::kLive], row, out, sum_taps);
      }
    }
  }

  // The sums of what was stored, over all pixels, at this thread's first channel.
  __device__ __forceinline__ void store_totals(float* at, bool works) {
    EFFDET_UNROLL
    for (int i = 0; i < 2; ++i) EFFDET_UNROLL
    for (int bits = 4; bits < kWarp; bits *= 2) total_[i] += __shfl_xor_sync(kAll, total_[i], bits);
    if (works && lane_id() < 4) store(at, float2{total_[0], total_[1]});
  }

 private:
  template <typename SumTaps>
  __device__ __forceinline__ void finish(Products (&sums)[S::kTiles], int row, const OutputRows<T>& out,
                                         const SumTaps& sum_taps) {
    EFFDET_UNROLL
    for (int tile = 0; tile < S::kTiles; ++tile) {
      float (&z)[4] = sums[tile].values;
      const int column = out.first_column + tile * 16 + lane_id() / 4;
      // Zeros of the diagonals times a NaN or an infinity of another channel are NaN: once more, without them.
      if (!finite(z[0] + z[1] + z[2] + z[3])) sum_taps(z, row, column);
      float values[4];
      EFFDET_UNROLL
      for (int i = 0; i < 4; ++i) values[i] = z[i] * scale_[i % 2] + shift_[i % 2];
      activate<kAct>(values, out.act);
      EFFDET_UNROLL
      for (int half = 0; half < 2; ++half) {
        if (column + half * 8 < out.out_width) {
          const int at = (row * out.out_width + column + half * 8) * out.channels;
          store(out.y + at, narrow_pair<T>(values[2 * half], values[2 * half + 1]));
          total_[0] += values[2 * half];
          total_[1] += values[2 * half + 1];
        }
      }
    }
  }

  RightOperand weights_[kKernel][S::kPairs];
  Products sums_[S::kLive][S::kTiles];
  float scale_[2] = {1.0f, 1.0f}, shift_[2] = {0.0f, 0.0f}, total_[2] = {0.0f, 0.0f};
};

}  // namespace effdet::cuda
