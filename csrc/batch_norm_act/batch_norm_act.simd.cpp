// Training batch norm. Statistics of blocks of pixels are taken about each block's own mean and merged in double
// precision in the order of the blocks, so that they do not depend on the number of threads; then one pass applies them.
#include "batch_norm_act/params.h"
#include "common/parallel_for.h"
#include "cpu/derivative.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

// Blocks of pixels, none across two images.
struct Blocks {
  int64_t per_image, count;
  EFFDET_INLINE explicit Blocks(const BatchNormParams& p)
      : per_image(divide_up(p.pixels, kNormBlock)), count(p.batch * per_image) {}
};

// Where block `index` begins in a map of these strides, and its pixels.
template <typename T>
EFFDET_INLINE const T* block_of(const BatchNormParams& p, const Blocks& blocks, int64_t index, const void* map,
                                int64_t batch_stride, int64_t pixel_stride, int64_t* pixels) {
  const int64_t first = index % blocks.per_image * kNormBlock;
  *pixels = least(kNormBlock, p.pixels - first);
  return static_cast<const T*>(map) + index / blocks.per_image * batch_stride + first * pixel_stride;
}

template <typename T>
void block_statistics(const BatchNormParams& p, const Blocks& blocks, int64_t index) {
  using A = Acc<T>;
  using V = Vec<A>;
  int64_t n;
  const T* x = block_of<T>(p, blocks, index, p.x, p.x_batch_stride, p.x_pixel_stride, &n);
  A* partial = static_cast<A*>(p.partial) + index * 3 * p.channels;
  for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
    const int64_t lanes = p.channels - c;
    V sum{};
    for (int64_t i = 0; i < n; ++i) sum += load_n(x + i * p.x_pixel_stride + c, lanes);
    const V mean = sum / static_cast<A>(n);
    V rest{}, squares{};
    for (int64_t i = 0; i < n; ++i) {
      const V d = load_n(x + i * p.x_pixel_stride + c, lanes) - mean;
      rest += d;
      squares += d * d;
    }
    store_n(partial + c, mean, lanes);
    store_n(partial + p.channels + c, rest, lanes);
    store_n(partial + 2 * p.channels + c, squares, lanes);
  }
}

// Chan, Golub and LeVeque's merge of (count, mean, sum of squares about it), in double precision.
template <typename A>
void merge_statistics(const BatchNormParams& p, const Blocks& blocks, int64_t c) {
  double count = 0, mean = 0, squares = 0;
  for (int64_t index = 0; index < blocks.count; ++index) {
    const A* partial = static_cast<const A*>(p.partial) + index * 3 * p.channels + c;
    const double n = static_cast<double>(least(kNormBlock, p.pixels - index % blocks.per_image * kNormBlock));
    const double rest = partial[p.channels];  // what rounding the block's mean has left
    const double block_mean = partial[0] + rest / n;
    const double block_squares = partial[2 * p.channels] - rest * rest / n;
    const double delta = block_mean - mean, total = count + n;
    mean += delta * (n / total);
    squares += block_squares + delta * delta * (count * n / total);
    count = total;
  }
  static_cast<A*>(p.mean)[c] = static_cast<A>(mean);
  static_cast<A*>(p.variance)[c] = static_cast<A>(squares / count);
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

template <typename A>
EFFDET_INLINE Vec<A> inverse_deviation(const BatchNormParams& p, int64_t c, int64_t lanes) {
  const Vec<A> variance = load_n(static_cast<const A*>(p.variance) + c, lanes);
  Vec<A> r{};
  for (int i = 0; i < kLanes<A>; ++i) r[i] = A(1) / __builtin_sqrt(variance[i] + static_cast<A>(p.eps));
  return r;
}

template <typename T>
Status forward(const BatchNormParams& p, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  const Blocks blocks(p);
  statistics<T>(p, blocks, threads);
  parallel_for(blocks.count, threads, [&](int64_t index) {
    int64_t n;
    const T* x = block_of<T>(p, blocks, index, p.x, p.x_batch_stride, p.x_pixel_stride, &n);
    T* y = const_cast<T*>(block_of<T>(p, blocks, index, p.y, p.pixels * p.channels, p.channels, &n));
    for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
      const int64_t lanes = p.channels - c;
      const V mean = load_n(static_cast<const A*>(p.mean) + c, lanes);
      const V scale = inverse_deviation<A>(p, c, lanes) * load_n(static_cast<const A*>(p.weight) + c, lanes);
      const V bias = load_n(static_cast<const A*>(p.bias) + c, lanes);
      for (int64_t i = 0; i < n; ++i) {
        const V v = (load_n(x + i * p.x_pixel_stride + c, lanes) - mean) * scale + bias;
        store_n(y + i * p.channels + c, activate<A>(v, p.act), lanes);
      }
    }
  });
  return kOk;
}

// Calls use(i, delta, normalised) for the pixels of a block and one vector of channels.
template <typename T, typename Use>
EFFDET_INLINE void each_delta(const BatchNormParams& p, const T* x, const T* g, int64_t n, int64_t c, const Use& use) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t lanes = p.channels - c;
  const V mean = load_n(static_cast<const A*>(p.mean) + c, lanes);
  const V r = inverse_deviation<A>(p, c, lanes);
  const V weight = load_n(static_cast<const A*>(p.weight) + c, lanes);
  const V bias = load_n(static_cast<const A*>(p.bias) + c, lanes);
  for (int64_t i = 0; i < n; ++i) {
    const V normalised = (load_n(x + i * p.x_pixel_stride + c, lanes) - mean) * r;
    const V slope = derivative<A>(normalised * weight + bias, p.act);
    use(i, load_n(g + i * p.grad_pixel_stride + c, lanes) * slope, normalised, r * weight);
  }
}

template <typename T>
Status backward(const BatchNormParams& p, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  const Blocks blocks(p);
  statistics<T>(p, blocks, threads);
  A* partial = static_cast<A*>(p.partial);
  parallel_for(blocks.count, threads, [&](int64_t index) {
    int64_t n;
    const T* x = block_of<T>(p, blocks, index, p.x, p.x_batch_stride, p.x_pixel_stride, &n);
    const T* g = block_of<T>(p, blocks, index, p.grad, p.grad_batch_stride, p.grad_pixel_stride, &n);
    for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
      V bias{}, weight{};
      each_delta(p, x, g, n, c, [&](int64_t, V delta, V normalised, V) __attribute__((always_inline)) {
        bias += delta;
        weight += delta * normalised;
      });
      store_n(partial + index * 3 * p.channels + c, bias, p.channels - c);
      store_n(partial + index * 3 * p.channels + p.channels + c, weight, p.channels - c);
    }
  });
  for (int64_t c = 0; c < p.channels; ++c) {
    double bias = 0, weight = 0;
    for (int64_t index = 0; index < blocks.count; ++index) {
      bias += partial[index * 3 * p.channels + c];
      weight += partial[index * 3 * p.channels + p.channels + c];
    }
    static_cast<A*>(p.grad_bias)[c] = static_cast<A>(bias);
    static_cast<A*>(p.grad_weight)[c] = static_cast<A>(weight);
  }
  if (!p.y) return kOk;
  const A share = A(1) / static_cast<A>(p.batch * p.pixels);
  parallel_for(blocks.count, threads, [&](int64_t index) {
    int64_t n;
    const T* x = block_of<T>(p, blocks, index, p.x, p.x_batch_stride, p.x_pixel_stride, &n);
    const T* g = block_of<T>(p, blocks, index, p.grad, p.grad_batch_stride, p.grad_pixel_stride, &n);
    T* dx = const_cast<T*>(block_of<T>(p, blocks, index, p.y, p.pixels * p.channels, p.channels, &n));
    for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
      const int64_t lanes = p.channels - c;
      const V bias = load_n(static_cast<const A*>(p.grad_bias) + c, lanes) * splat<A>(share);
      const V weight = load_n(static_cast<const A*>(p.grad_weight) + c, lanes) * splat<A>(share);
      each_delta(p, x, g, n, c, [&](int64_t i, V delta, V normalised, V scale) __attribute__((always_inline)) {
        store_n(dx + i * p.channels + c, scale * (delta - bias - normalised * weight), lanes);
      });
    }
  });
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
