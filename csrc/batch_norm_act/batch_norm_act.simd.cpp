// Training batch norm. Statistics of blocks of pixels are taken about each block's own mean and merged in double
// precision in the order of the blocks, so that they do not depend on the number of threads; then one pass applies
// them.
#include "batch_norm_act/params.h"
#include "common/parallel_for.h"
#include "cpu/derivative.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

// Blocks of pixels, none across two images.
struct Blocks {
  int64_t size, per_image, count;
  EFFDET_INLINE explicit Blocks(const BatchNormParams& p)
      : size(norm_block(p.channels)), per_image(divide_up(p.pixels, size)), count(p.batch * per_image) {}
  EFFDET_INLINE int64_t pixels(const BatchNormParams& p, int64_t index) const {
    return least(size, p.pixels - index % per_image * size);
  }
};

// Where block `index` begins in a map of these strides.
template <typename T>
EFFDET_INLINE const T* block_of(const Blocks& blocks, int64_t index, const void* map, int64_t batch_stride,
                                int64_t pixel_stride) {
  return static_cast<const T*>(map) + index / blocks.per_image * batch_stride +
         index % blocks.per_image * blocks.size * pixel_stride;
}

// Calls use(first channel, vectors) for groups of up to 4 vectors, the number known to the compiler: a group's channels
// of one pixel are neighbours in memory.
constexpr int kGroup = 4;
template <int kVectors>
struct Count {
  static constexpr int value = kVectors;
};
template <typename T, typename Use>
EFFDET_INLINE void each_group(int64_t channels, const Use& use) {
  int64_t c = 0;
  for (; c + kGroup * kLanes<T> <= channels; c += kGroup * kLanes<T>) use(c, Count<kGroup>());
  for (; c < channels; c += kLanes<T>) use(c, Count<1>());
}

template <typename T>
void block_statistics(const BatchNormParams& p, const Blocks& blocks, int64_t index) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t n = blocks.pixels(p, index);
  const T* x = block_of<T>(blocks, index, p.x, p.x_batch_stride, p.x_pixel_stride);
  A* partial = static_cast<A*>(p.partial) + index * 3 * p.channels;
  each_group<T>(p.channels, [&](int64_t c, auto count) __attribute__((always_inline)) {
    constexpr int kN = decltype(count)::value, kL = kLanes<T>;
    const int64_t lanes = kN == 1 ? p.channels - c : kL;
    V mean[kN] = {}, rest[kN] = {}, squares[kN] = {};
    for (int64_t i = 0; i < n; ++i)
      for (int v = 0; v < kN; ++v) mean[v] += load_n(x + i * p.x_pixel_stride + c + v * kL, lanes);
    for (int v = 0; v < kN; ++v) mean[v] /= splat<A>(static_cast<A>(n));
    for (int64_t i = 0; i < n; ++i)
      for (int v = 0; v < kN; ++v) {
        const V d = load_n(x + i * p.x_pixel_stride + c + v * kL, lanes) - mean[v];
        rest[v] += d;
        squares[v] += d * d;
      }
    for (int v = 0; v < kN; ++v) {
      store_n(partial + c + v * kL, mean[v], lanes);
      store_n(partial + p.channels + c + v * kL, rest[v], lanes);
      store_n(partial + 2 * p.channels + c + v * kL, squares[v], lanes);
    }
  });
}

template <typename A>
EFFDET_INLINE A* reciprocal_deviations(const BatchNormParams& p, const Blocks& blocks) {
  return static_cast<A*>(p.partial) + 3 * blocks.count * p.channels;
}

// Those of the variances of p, where no merge made them.
template <typename A>
void deviate(const BatchNormParams& p, const Blocks& blocks) {
  A* deviations = reciprocal_deviations<A>(p, blocks);
  for (int64_t c = 0; c < p.channels; ++c)
    deviations[c] = static_cast<A>(1 / __builtin_sqrt(static_cast<const A*>(p.variance)[c] + p.eps));
}

// Chan, Golub and LeVeque's merge of (count, mean, sum of squares about it), in double precision. Means are taken from
// the first block's: their differences would lose the digits that a large mean has before the point.
template <typename A>
void merge_statistics(const BatchNormParams& p, const Blocks& blocks, int64_t c) {
  const double first = static_cast<const A*>(p.partial)[c];
  double count = 0, mean = 0, squares = 0;
  for (int64_t index = 0; index < blocks.count; ++index) {
    const A* partial = static_cast<const A*>(p.partial) + index * 3 * p.channels + c;
    const double n = static_cast<double>(blocks.pixels(p, index));
    const double rest = partial[p.channels];  // what rounding the block's mean has left
    const double block_mean = (partial[0] - first) + rest / n;
    const double block_squares = partial[2 * p.channels] - rest * rest / n;
    const double delta = block_mean - mean, total = count + n;
    mean += delta * (n / total);
    squares += block_squares + delta * delta * (count * n / total);
    count = total;
  }
  static_cast<A*>(p.mean)[c] = static_cast<A>(first + mean);
  static_cast<A*>(p.variance)[c] = static_cast<A>(squares / count);
  reciprocal_deviations<A>(p, blocks)[c] = static_cast<A>(1 / __builtin_sqrt(squares / count + p.eps));
}

template <typename T>
void statistics(const BatchNormParams& p, const Blocks& blocks, int threads) {
  parallel_for(blocks.count, threads, [&](int64_t index) { block_statistics<T>(p, blocks, index); });
  constexpr int64_t kShare = 32;
  parallel_for(divide_up(p.channels, kShare), threads, [&](int64_t part) {
    for (int64_t c = part * kShare; c < least((part + 1) * kShare, p.channels); ++c)
      merge_statistics<Acc<T>>(p, blocks, c);
  });
}

template <typename T>
Status forward(const BatchNormParams& p, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  const Blocks blocks(p);
  if (p.given)
    deviate<A>(p, blocks);
  else
    statistics<T>(p, blocks, threads);
  const A* deviations = reciprocal_deviations<A>(p, blocks);
  parallel_for(blocks.count, threads, [&](int64_t index) {
    const int64_t n = blocks.pixels(p, index);
    const T* x = block_of<T>(blocks, index, p.x, p.x_batch_stride, p.x_pixel_stride);
    T* y = const_cast<T*>(block_of<T>(blocks, index, p.y, p.pixels * p.channels, p.channels));
    each_group<T>(p.channels, [&](int64_t c, auto count) __attribute__((always_inline)) {
      constexpr int kN = decltype(count)::value, kL = kLanes<T>;
      const int64_t lanes = kN == 1 ? p.channels - c : kL;
      V mean[kN], scale[kN], bias[kN];
      for (int v = 0; v < kN; ++v) {
        const int64_t at = c + v * kL;
        mean[v] = load_n(static_cast<const A*>(p.mean) + at, lanes);
        scale[v] = load_n(deviations + at, lanes) * load_n(static_cast<const A*>(p.weight) + at, lanes);
        bias[v] = load_n(static_cast<const A*>(p.bias) + at, lanes);
      }
      for (int64_t i = 0; i < n; ++i)
        for (int v = 0; v < kN; ++v) {
          const V value = (load_n(x + i * p.x_pixel_stride + c + v * kL, lanes) - mean[v]) * scale[v] + bias[v];
          store_n(y + i * p.channels + c + v * kL, activate<A>(value, p.act), lanes);
        }
    });
  });
  return kOk;
}

// Calls use(pixel, vector, delta, normalised) for a block's pixels and a group of kN vectors from channel c on.
template <int kN, typename T, typename Use>
EFFDET_INLINE void each_delta(const BatchNormParams& p, const Blocks& blocks, int64_t index, int64_t c,
                              const Use& use) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int kL = kLanes<T>;
  const int64_t lanes = kN == 1 ? p.channels - c : kL, n = blocks.pixels(p, index);
  const T* x = block_of<T>(blocks, index, p.x, p.x_batch_stride, p.x_pixel_stride) + c;
  const T* g = block_of<T>(blocks, index, p.grad, p.grad_batch_stride, p.grad_pixel_stride) + c;
  V mean[kN], deviation[kN], weight[kN], bias[kN];
  for (int v = 0; v < kN; ++v) {
    const int64_t at = c + v * kL;
    mean[v] = load_n(static_cast<const A*>(p.mean) + at, lanes);
    deviation[v] = load_n(reciprocal_deviations<A>(p, blocks) + at, lanes);
    weight[v] = load_n(static_cast<const A*>(p.weight) + at, lanes);
    bias[v] = load_n(static_cast<const A*>(p.bias) + at, lanes);
  }
  for (int64_t i = 0; i < n; ++i)
    for (int v = 0; v < kN; ++v) {
      const V normalised = (load_n(x + i * p.x_pixel_stride + v * kL, lanes) - mean[v]) * deviation[v];
      const V slope = derivative<A>(normalised * weight[v] + bias[v], p.act);
      use(i, v, load_n(g + i * p.grad_pixel_stride + v * kL, lanes) * slope, normalised);
    }
}

// Of delta and of delta * normalised, over all pixels of each channel.
template <typename T>
void sums(const BatchNormParams& p, const Blocks& blocks, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  A* partial = static_cast<A*>(p.partial);
  parallel_for(blocks.count, threads, [&](int64_t index) {
    each_group<T>(p.channels, [&](int64_t c, auto count) __attribute__((always_inline)) {
      constexpr int kN = decltype(count)::value, kL = kLanes<T>;
      const int64_t lanes = kN == 1 ? p.channels - c : kL;
      V bias[kN] = {}, weight[kN] = {};
      each_delta<kN, T>(p, blocks, index, c, [&](int64_t, int v, V delta, V normalised) __attribute__((always_inline)) {
        bias[v] += delta;
        weight[v] += delta * normalised;
      });
      for (int v = 0; v < kN; ++v) {
        store_n(partial + index * 3 * p.channels + c + v * kL, bias[v], lanes);
        store_n(partial + (index * 3 + 1) * p.channels + c + v * kL, weight[v], lanes);
      }
    });
  });
  constexpr int64_t kShare = 32;
  parallel_for(divide_up(p.channels, kShare), threads, [&](int64_t part) {
    for (int64_t c = part * kShare; c < least((part + 1) * kShare, p.channels); ++c) {
      double bias = 0, weight = 0;
      for (int64_t index = 0; index < blocks.count; ++index) {
        bias += partial[index * 3 * p.channels + c];
        weight += partial[(index * 3 + 1) * p.channels + c];
      }
      static_cast<A*>(p.grad_bias)[c] = static_cast<A>(bias);
      static_cast<A*>(p.grad_weight)[c] = static_cast<A>(weight);
    }
  });
}

// From the sums, or from their averages if those are given.
template <typename T>
void input_gradient(const BatchNormParams& p, const Blocks& blocks, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  const V share = splat<A>(p.given ? A(1) : A(1) / static_cast<A>(p.batch * p.pixels));
  parallel_for(blocks.count, threads, [&](int64_t index) {
    T* dx = const_cast<T*>(block_of<T>(blocks, index, p.y, p.pixels * p.channels, p.channels));
    each_group<T>(p.channels, [&](int64_t c, auto count) __attribute__((always_inline)) {
      constexpr int kN = decltype(count)::value, kL = kLanes<T>;
      const int64_t lanes = kN == 1 ? p.channels - c : kL;
      V bias[kN], weight[kN], scale[kN];
      for (int v = 0; v < kN; ++v) {
        const int64_t at = c + v * kL;
        bias[v] = load_n(static_cast<const A*>(p.grad_bias) + at, lanes) * share;
        weight[v] = load_n(static_cast<const A*>(p.grad_weight) + at, lanes) * share;
        scale[v] = load_n(reciprocal_deviations<A>(p, blocks) + at, lanes) *
                   load_n(static_cast<const A*>(p.weight) + at, lanes);
      }
      each_delta<kN, T>(p, blocks, index, c,
                        [&](int64_t i, int v, V delta, V normalised) __attribute__((always_inline)) {
                          const V value = scale[v] * (delta - bias[v] - normalised * weight[v]);
                          store_n(dx + i * p.channels + c + v * kL, value, lanes);
                        });
    });
  });
}

template <typename T>
Status backward(const BatchNormParams& p, int threads) {
  const Blocks blocks(p);
  deviate<Acc<T>>(p, blocks);
  if (!p.given) sums<T>(p, blocks, threads);
  if (p.y) input_gradient<T>(p, blocks, threads);
  return kOk;
}

}  // namespace

Status batch_norm_act(const BatchNormParams& p, int threads) {
  if (p.dtype == kFloat32) return forward<float>(p, threads);
  if (p.dtype == kFloat64) return forward<double>(p, threads);
  if (p.dtype == kBFloat16) return forward<BFloat16>(p, threads);
  return kBadDtype;
}

Status batch_norm_act_backward(const BatchNormParams& p, int threads) {
  if (p.dtype == kFloat32) return backward<float>(p, threads);
  if (p.dtype == kFloat64) return backward<double>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
