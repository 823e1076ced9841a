// Depthwise convolution of rows that lie padded in scratch memory: a ring of as many rows as the kernel has.
#pragma once

#include "common/map.h"
#include "cpu/activation.h"

namespace effdet {
namespace EFFDET_ISA {

// A window of a map: rows of `pixels` places of `width` accumulator-type channels, zeros where the map is padded.
template <typename A>
struct Ring {
  A* data;
  int64_t rows, pixels, width;
  const A* zeros;  // a row outside the map

  EFFDET_INLINE int64_t row_size() const { return pixels * width; }
  static EFFDET_INLINE int64_t size(int64_t rows, int64_t pixels, int64_t width) { return (rows + 1) * pixels * width; }
  // In `memory`, of size() elements; everything zero.
  EFFDET_INLINE Ring(A* memory, int64_t rows_, int64_t pixels_, int64_t width_)
      : data(memory), rows(rows_), pixels(pixels_), width(width_), zeros(memory + rows_ * pixels_ * width_) {}
  EFFDET_INLINE void clear() const { std::memset(data, 0, sizeof(A) * size(rows, pixels, width)); }
  EFFDET_INLINE A* row(int64_t h) const { return data + h % rows * row_size(); }
};

// What becomes of the sums of a row of outputs.
template <typename Out>
struct RowEpilogue {
  const Acc<Out>* scale;  // null: neither scale nor shift
  const Acc<Out>* shift;
  int act;
  Out* y;  // [count, ...] from pixel to pixel `ldy`
  int64_t ldy;
  int64_t channels;  // of this slice
  Acc<Out>* sums;    // [channels] to add the sums over the row to, or null
};

template <typename Out, int kTile>
EFFDET_INLINE void finish_pixels(const RowEpilogue<Out>& out, int64_t channel, int64_t pixel, Vec<Acc<Out>>* sum,
                                 Vec<Acc<Out>>* total) {
  using A = Acc<Out>;
  const int64_t n = out.channels - channel;
  if (out.scale) {
    const Vec<A> scale = load(out.scale + channel), shift = load(out.shift + channel);
#pragma GCC unroll 8
    for (int t = 0; t < kTile; ++t) sum[t] = sum[t] * scale + shift;
  }
  if (out.act == kSwish) {
#pragma GCC unroll 8
    for (int t = 0; t < kTile; ++t) sum[t] = swish<A>(sum[t]);
  } else if (out.act != kNone) {
#pragma GCC unroll 8
    for (int t = 0; t < kTile; ++t) sum[t] = activate<A>(sum[t], out.act);
  }
  Out* y = out.y + pixel * out.ldy + channel;
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) {
    *total += sum[t];
    store_n(y + t * out.ldy, sum[t], n);
  }
}

// kTile neighbouring outputs of one vector of channels.
template <typename A, int kK, int kStride, int kTile>
EFFDET_INLINE void convolve_pixels(const A* const* rows, int64_t offset, int64_t width, const A* weights, Vec<A>* sum) {
  constexpr int kL = kLanes<A>;
#pragma GCC unroll 8
  for (int t = 0; t < kTile; ++t) sum[t] = Vec<A>{};
#pragma GCC unroll 1
  for (int i = 0; i < kK; ++i) {
    const A* x = rows[i] + offset;
    Vec<A> w[kK];
#pragma GCC unroll 8
    for (int j = 0; j < kK; ++j) w[j] = load(weights + (i * kK + j) * kL);
#pragma GCC unroll 32
    for (int p = 0; p < (kTile - 1) * kStride + kK; ++p) {
      const Vec<A> pixel = load(x + p * width);
#pragma GCC unroll 8
      for (int j = 0; j < kK; ++j) {
        if ((p - j) % kStride == 0 && p - j >= 0 && (p - j) / kStride < kTile) {
          sum[(p - j) / kStride] = pixel * w[j] + sum[(p - j) / kStride];
        }
      }
    }
  }
}

// The outputs from `pixel` to `count` of one vector of channels: tiles of kTile, what is left in ever smaller ones.
template <typename Out, int kK, int kStride, int kTile>
EFFDET_INLINE void convolve_tiles(const Acc<Out>* const* rows, int64_t width, int64_t channel, int64_t pixel,
                                  int64_t count, const Acc<Out>* weights, const RowEpilogue<Out>& out,
                                  Vec<Acc<Out>>* total) {
  using A = Acc<Out>;
  for (; pixel + kTile <= count; pixel += kTile) {
    Vec<A> sum[kTile];
    convolve_pixels<A, kK, kStride, kTile>(rows, pixel * kStride * width + channel, width, weights, sum);
    finish_pixels<Out, kTile>(out, channel, pixel, sum, total);
  }
  if constexpr (kTile > 1)
    convolve_tiles<Out, kK, kStride, kTile / 2>(rows, width, channel, pixel, count, weights, out, total);
}

// One row of outputs with kernel kK and stride kStride known to the compiler.
template <typename Out, int kK, int kStride>
void convolve_row_of(const Acc<Out>* const* rows, int64_t width, int64_t count, const Acc<Out>* weights,
                     const RowEpilogue<Out>& out) {
  using A = Acc<Out>;
  constexpr int kL = kLanes<A>, kTile = kStride == 1 ? 8 : 4;
  for (int64_t channel = 0; channel < out.channels; channel += kL) {
    Vec<A> total{};
    convolve_tiles<Out, kK, kStride, kTile>(rows, width, channel, 0, count, weights + channel * kK * kK, out, &total);
    if (out.sums) {
      A* sums = out.sums + channel;
      store_n(sums, load_n(sums, out.channels - channel) + total, out.channels - channel);
    }
  }
}

// The same for any kernel and stride.
template <typename Out>
void convolve_row_any(const Acc<Out>* const* rows, int64_t k, int64_t stride, int64_t width, int64_t count,
                      const Acc<Out>* weights, const RowEpilogue<Out>& out) {
  using A = Acc<Out>;
  constexpr int kL = kLanes<A>;
  for (int64_t channel = 0; channel < out.channels; channel += kL) {
    const A* w = weights + channel * k * k;
    Vec<A> total{};
    for (int64_t pixel = 0; pixel < count; ++pixel) {
      Vec<A> sum[1] = {};
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
          sum[0] = load(rows[i] + (pixel * stride + j) * width + channel) * load(w + (i * k + j) * kL) + sum[0];
      finish_pixels<Out, 1>(out, channel, pixel, sum, &total);
    }
    if (out.sums) {
      A* sums = out.sums + channel;
      store_n(sums, load_n(sums, out.channels - channel) + total, out.channels - channel);
    }
  }
}

// `count` outputs of one row: rows[i] is the first pixel under the kernel's row i; `weights` [channels / lanes][k * k]
// vectors.
template <typename Out>
EFFDET_INLINE void convolve_row(const Acc<Out>* const* rows, int64_t k, int64_t stride, int64_t width, int64_t count,
                                const Acc<Out>* weights, const RowEpilogue<Out>& out) {
  if (k == 3 && stride == 1) return convolve_row_of<Out, 3, 1>(rows, width, count, weights, out);
  if (k == 3 && stride == 2) return convolve_row_of<Out, 3, 2>(rows, width, count, weights, out);
  if (k == 5 && stride == 1) return convolve_row_of<Out, 5, 1>(rows, width, count, weights, out);
  if (k == 5 && stride == 2) return convolve_row_of<Out, 5, 2>(rows, width, count, weights, out);
  convolve_row_any<Out>(rows, k, stride, width, count, weights, out);
}

}  // namespace EFFDET_ISA
}  // namespace effdet
