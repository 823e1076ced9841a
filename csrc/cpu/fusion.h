// Rows of the weighted sum of resampled maps, and an activation of it: weighted_fusion, and what separable_conv loads.
#pragma once

#include "cpu/activation.h"
#include "weighted_fusion/params.h"

namespace effdet {
namespace EFFDET_ISA {

// One output row's source in one map: pixel `place` comes from the pixel at column(place) of `row`.
EFFDET_INLINE int64_t nearest_index(int64_t place, int64_t from, int64_t to) {  // as torch's interpolate has it
  if (from == to) return place;
  if (to == 2 * from) return place / 2;
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  return least<int64_t>(static_cast<int64_t>(static_cast<float>(place) * scale), from - 1);
}

template <typename A>
struct Linear {
  int64_t first, second;
  A weight;  // of second
  EFFDET_INLINE Linear(int64_t place, int64_t from, int64_t to) {
    const A scale = static_cast<A>(from) / static_cast<A>(to);
    const A at = most<A>((static_cast<A>(place) + A(0.5)) * scale - A(0.5), A(0));
    first = least<int64_t>(static_cast<int64_t>(at), from - 1);
    second = least<int64_t>(first + 1, from - 1);
    weight = at - static_cast<A>(first);
  }
};

// What each map is multiplied by: the weight, normalised.
template <typename A>
struct Shares {
  A of[kMaxFused] = {A(1), A(1), A(1)};
  A total = 1;  // of what is normalised
  EFFDET_INLINE explicit Shares(const Fusion& fusion) {
    if (fusion.method == kSum) return;
    const A* weight = static_cast<const A*>(fusion.weight);
    const int64_t count = fusion.count;
    A largest = weight[0];
    for (int64_t m = 1; m < count; ++m) largest = weight[m] > largest || weight[m] != weight[m] ? weight[m] : largest;
    total = 0;
    for (int64_t m = 0; m < count; ++m) {
      const A positive = weight[m] > 0 || weight[m] != weight[m] ? weight[m] : A(0);
      of[m] = fusion.method == kSoftmax ? exponential(splat<A>(weight[m] - largest))[0] : positive;
      total += of[m];
    }
    if (fusion.method == kFastAttention) total += A(1e-4);
    for (int64_t m = 0; m < count; ++m) of[m] /= total;
  }
};

// Adds share * (the resampled map) at places [first, first + count) of row h to `to`, or sets it where `start`; then,
// where `end`, applies `act`. `to` has `width` channels per place, whole vectors, zeros beyond `channels`.
template <typename T>
struct FusionPass {
  using A = Acc<T>;
  using V = Vec<A>;
  A share;
  bool start, end;
  int act;
  int64_t channels, width;
  A* to;

  template <typename Fetch>
  EFFDET_INLINE void each(int64_t first, int64_t count, const Fetch& fetch) const {
    for (int64_t i = 0; i < count; ++i) {
      const auto source = fetch(first + i);
      A* place = to + i * width;
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        V value = source(c) * splat<A>(share);
        if (!start) value += load(place + c);
        store(place + c, end ? activate<A>(value, act) : value);
      }
    }
  }
};

template <typename T>
void fuse_pass(const FusionPass<T>& pass, const Map& map, int64_t image, int resample, const Fusion& fusion, int64_t h,
               int64_t height, int64_t all_columns, int64_t first, int64_t count) {
  using A = Acc<T>;
  using V = Vec<A>;
  const T* data = static_cast<const T*>(map.data) + image * map.batch_stride;
  const int64_t channels = pass.channels;
  auto from = [&](const T* pixel, int64_t c) __attribute__((always_inline)) { return load_n(pixel + c, channels - c); };
  if (resample == kIdentity) {
    const T* row = data + h * map.row_stride;
    return pass.each(first, count, [&](int64_t place) __attribute__((always_inline)) {
      const T* pixel = row + place * map.pixel_stride;
      return [=](int64_t c) __attribute__((always_inline)) { return load_n(pixel + c, channels - c); };
    });
  }
  if (resample == kNearest) {
    const T* row = data + nearest_index(h, map.height, height) * map.row_stride;
    return pass.each(first, count, [&](int64_t place) __attribute__((always_inline)) {
      const T* pixel = row + nearest_index(place, map.width, all_columns) * map.pixel_stride;
      return [=](int64_t c) __attribute__((always_inline)) { return load_n(pixel + c, channels - c); };
    });
  }
  if (resample == kBilinear) {
    const Linear<A> v(h, map.height, height);
    const T* upper_row = data + v.first * map.row_stride;
    const T* lower_row = data + v.second * map.row_stride;
    return pass.each(first, count, [&](int64_t place) __attribute__((always_inline)) {
      const Linear<A> u(place, map.width, all_columns);
      const int64_t left = u.first * map.pixel_stride, right = u.second * map.pixel_stride;
      return [=, &from](int64_t c) __attribute__((always_inline)) {
        const V above = from(upper_row + left, c) * (A(1) - u.weight) + from(upper_row + right, c) * u.weight;
        const V below = from(lower_row + left, c) * (A(1) - u.weight) + from(lower_row + right, c) * u.weight;
        return above * (A(1) - v.weight) + below * v.weight;
      };
    });
  }
  const int64_t top = 2 * h - fusion.pool_top;  // 3x3 windows, 2 apart
  const int64_t row_begin = most<int64_t>(top, 0), row_end = least(top + 3, map.height);
  pass.each(first, count, [&](int64_t place) __attribute__((always_inline)) {
    const int64_t left = 2 * place - fusion.pool_left;
    const int64_t begin = most<int64_t>(left, 0), end = least(left + 3, map.width);
    return [=, &from, &map](int64_t c) __attribute__((always_inline)) {
      V value = splat<A>(-__builtin_inf());
      for (int64_t y = row_begin; y < row_end; ++y)
        for (int64_t x = begin; x < end; ++x)
          value = nan_max(value, from(data + y * map.row_stride + x * map.pixel_stride, c));
      return value;
    };
  });
}

// Places [first, first + count) of row h of act(fusion of the maps), into `to`.
template <typename T>
EFFDET_INLINE void fuse_row(const Map* maps, const Fusion& fusion, int act, int64_t image, int64_t channels, int64_t h,
                            int64_t height, int64_t all_columns, int64_t first, int64_t count, Acc<T>* to) {
  using A = Acc<T>;
  const Shares<A> shares(fusion);
  for (int64_t m = 0; m < fusion.count; ++m) {
    FusionPass<T> pass;
    pass.share = shares.of[m];
    pass.start = m == 0;
    pass.end = m == fusion.count - 1;
    pass.act = act;
    pass.channels = channels;
    pass.width = round_up(channels, kLanes<T>);
    pass.to = to;
    fuse_pass<T>(pass, maps[m], image, fusion.resample[m], fusion, h, height, all_columns, first, count);
  }
}

}  // namespace EFFDET_ISA
}  // namespace effdet
