// The gradients of weighted_fusion. A work item has all pixels of one image and one vector of channels: it may add to
// any pixel, and no other item touches them. A tie of a max-pool goes to the first maximum, as in torch.
#include "common/parallel_for.h"
#include "cpu/fusion.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

// One map's part: for every output pixel calls spread(pixel of grad, share * grad) and adds up grad * resampled x.
template <typename T>
struct MapGradient {
  using A = Acc<T>;
  using V = Vec<A>;
  const FusionGradientParams& p;
  int index;
  A share;
  int64_t image, channel, lanes;

  EFFDET_INLINE V x_at(int64_t h, int64_t w) const {
    const Map& x = p.x[index];
    return load_n(
        static_cast<const T*>(x.data) + image * x.batch_stride + h * x.row_stride + w * x.pixel_stride + channel,
        lanes);
  }
  EFFDET_INLINE V grad_at(int64_t h, int64_t w) const {
    const Map& g = p.grad;
    return load_n(
        static_cast<const T*>(g.data) + image * g.batch_stride + h * g.row_stride + w * g.pixel_stride + channel,
        lanes);
  }
  EFFDET_INLINE void add(int64_t h, int64_t w, V value) const {
    if (!p.grad_x[index]) return;
    const Map& x = p.x[index];
    A* to = static_cast<A*>(p.grad_x[index]) + ((image * x.height + h) * x.width + w) * p.channels + channel;
    store_n(to, load_n(to, lanes) + value, lanes);
  }
  EFFDET_INLINE void clear() const {
    if (!p.grad_x[index]) return;
    const Map& x = p.x[index];
    A* to = static_cast<A*>(p.grad_x[index]) + image * x.height * x.width * p.channels + channel;
    for (int64_t i = 0; i < x.height * x.width; ++i) store_n(to + i * p.channels, V{}, lanes);
  }

  // The sum of grad * resampled x.
  V run() const {
    const Map& x = p.x[index];
    const V factor = splat<A>(share);
    clear();
    V total{};
    for (int64_t h = 0; h < p.grad.height; ++h)
      for (int64_t w = 0; w < p.grad.width; ++w) {
        const V g = grad_at(h, w), scaled = g * factor;
        switch (p.fusion.resample[index]) {
          case kIdentity:
            total += g * x_at(h, w);
            add(h, w, scaled);
            break;
          case kNearest: {
            const int64_t y = nearest_index(h, x.height, p.grad.height), z = nearest_index(w, x.width, p.grad.width);
            total += g * x_at(y, z);
            add(y, z, scaled);
            break;
          }
          case kBilinear: {
            const Linear<A> v(h, x.height, p.grad.height), u(w, x.width, p.grad.width);
            const A weights[4] = {(A(1) - v.weight) * (A(1) - u.weight), (A(1) - v.weight) * u.weight,
                                  v.weight * (A(1) - u.weight), v.weight * u.weight};
            for (int i = 0; i < 4; ++i) {
              const int64_t y = i < 2 ? v.first : v.second, z = i % 2 ? u.second : u.first;
              total += g * x_at(y, z) * weights[i];
              add(y, z, scaled * weights[i]);
            }
            break;
          }
          case kMaxPool:
            total += g * pool(h, w, scaled);
        }
      }
    return total;
  }

  EFFDET_INLINE V pool(int64_t h, int64_t w, V scaled) const {
    const Map& x = p.x[index];
    const int64_t top = 2 * h - p.fusion.pool_top, left = 2 * w - p.fusion.pool_left;
    V best = splat<A>(-static_cast<A>(__builtin_inf())), where = splat<A>(-1);
    for (int tap = 0; tap < 9; ++tap) {
      const int64_t y = top + tap / 3, z = left + tap % 3;
      if (y < 0 || y >= x.height || z < 0 || z >= x.width) continue;
      const V value = x_at(y, z), here = splat<A>(static_cast<A>(tap));
      const auto better = (value > best) | (value != value) | (where < V{});
      best = better ? value : best;
      where = better ? here : where;
    }
    for (int tap = 0; tap < 9; ++tap) {
      const int64_t y = top + tap / 3, z = left + tap % 3;
      if (y < 0 || y >= x.height || z < 0 || z >= x.width) continue;
      add(y, z, where == splat<A>(static_cast<A>(tap)) ? scaled : V{});
    }
    return best;
  }
};

template <typename T>
Status run(const FusionGradientParams& p, int threads) {
  using A = Acc<T>;
  const int64_t vectors = divide_up(p.channels, kLanes<T>);
  double* partial = static_cast<double*>(p.partial);
  const Shares<A> shares(p.fusion);
  parallel_for(p.batch * vectors, threads, [&](int64_t item) {
    const int64_t channel = item % vectors * kLanes<T>;
    for (int m = 0; m < p.fusion.count; ++m) {
      const MapGradient<T> gradient{p, m, shares.of[m], item / vectors, channel, p.channels - channel};
      const Vec<A> total = gradient.run();
      double sum = 0;
      for (int64_t i = 0; i < least<int64_t>(kLanes<T>, p.channels - channel); ++i) sum += total[i];
      partial[item * p.fusion.count + m] = sum;
    }
  });
  if (!p.grad_weight) return kOk;
  A of_share[kMaxFused] = {}, along = 0;  // along: what moves all shares together
  for (int64_t m = 0; m < p.fusion.count; ++m) {
    double sum = 0;
    for (int64_t item = 0; item < p.batch * vectors; ++item) sum += partial[item * p.fusion.count + m];
    of_share[m] = static_cast<A>(sum);
    along += of_share[m] * shares.of[m];
  }
  const A* weight = static_cast<const A*>(p.fusion.weight);
  A* grad_weight = static_cast<A*>(p.grad_weight);
  for (int64_t m = 0; m < p.fusion.count; ++m) {
    const A slope = p.fusion.method == kSoftmax ? shares.of[m] : (weight[m] > 0 ? A(1) : A(0)) / shares.total;
    grad_weight[m] = slope * (of_share[m] - along);
  }
  return kOk;
}

}  // namespace

Status weighted_fusion_gradient(const FusionGradientParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
