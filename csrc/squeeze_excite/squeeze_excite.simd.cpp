// The two small matrix-vector products of squeeze-excite, and what their gradients need; images in parallel.
#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/derivative.h"
#include "squeeze_excite/params.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

// The sum over channels of left[c] / divisor * right[c].
template <typename T>
EFFDET_INLINE T dot(const T* left, T divisor, const T* right, int64_t channels) {
  constexpr int kL = kLanes<T>;
  Vec<T> total{};
  for (int64_t c = 0; c < channels; c += kL)
    total += load_n(left + c, channels - c) / splat<T>(divisor) * load_n(right + c, channels - c);
  T sum = 0;
  for (int i = 0; i < kL; ++i) sum += total[i];
  return sum;
}

// One vector of the sum over r of factors[r] * rows[r, c], from `value` on.
template <typename T>
EFFDET_INLINE Vec<T> combine(const SqueezeExciteParams& p, const T* factors, const T* rows, int64_t c, Vec<T> value) {
  for (int64_t r = 0; r < p.reduced; ++r)
    value += load_n(rows + r * p.channels + c, p.channels - c) * splat<T>(factors[r]);
  return value;
}

// W1 m + b1, for one r.
template <typename T>
EFFDET_INLINE T reduce(const SqueezeExciteParams& p, const T* sums, int64_t r) {
  const T* weight = static_cast<const T*>(p.reduce_weight) + r * p.channels;
  return static_cast<const T*>(p.reduce_bias)[r] + dot(sums, static_cast<T>(p.count), weight, p.channels);
}

template <typename T>
void one_image(const SqueezeExciteParams& p, int64_t image, T* hidden) {
  const T* sums = static_cast<const T*>(p.sums) + image * p.channels;
  for (int64_t r = 0; r < p.reduced; ++r) hidden[r] = activate<T>(splat<T>(reduce(p, sums, r)), p.act)[0];
  for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
    const int64_t n = p.channels - c;
    const Vec<T> bias = load_n(static_cast<const T*>(p.expand_bias) + c, n);
    Vec<T> value = combine(p, hidden, static_cast<const T*>(p.expand_weight), c, bias);
    if (p.hard) {
      value = upper(lower(value + T(3), Vec<T>{}), splat<T>(6)) / T(6);
    } else {
      value = sigmoid<T>(value);
    }
    store_n(static_cast<T*>(p.gates) + image * p.channels + c, value, n);
  }
}

template <typename T>
Status run(const SqueezeExciteParams& p, int threads) {
  int status = kOk;
  parallel_for(p.batch, threads, [&](int64_t image) {
    T* hidden = static_cast<T*>(thread_scratch(sizeof(T) * p.reduced));
    if (!hidden) {
      __atomic_store_n(&status, kOutOfMemory, __ATOMIC_RELAXED);
      return;
    }
    one_image<T>(p, image, hidden);
  });
  return static_cast<Status>(status);
}

// What the backward keeps of an image: act(t) and the gradients of t and of u.
template <typename T>
struct Kept {
  T *hidden, *of_reduced, *of_expanded;
  EFFDET_INLINE Kept(const SqueezeExciteParams& p, int64_t image)
      : hidden(static_cast<T*>(p.partial) + image * (2 * p.reduced + p.channels)),
        of_reduced(hidden + p.reduced),
        of_expanded(of_reduced + p.reduced) {}
};

template <typename T>
void one_image_backward(const SqueezeExciteParams& p, int64_t image) {
  const Kept<T> kept(p, image);
  const T* sums = static_cast<const T*>(p.sums) + image * p.channels;
  const T* expand = static_cast<const T*>(p.expand_weight);
  for (int64_t r = 0; r < p.reduced; ++r) {
    const Vec<T> t = splat<T>(reduce(p, sums, r));
    kept.hidden[r] = activate<T>(t, p.act)[0];
    kept.of_reduced[r] = derivative<T>(t, p.act)[0];
  }
  for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
    const int64_t n = p.channels - c;
    const Vec<T> bias = load_n(static_cast<const T*>(p.expand_bias) + c, n);
    const Vec<T> u = combine(p, kept.hidden, expand, c, bias), s = sigmoid<T>(u);
    const Vec<T> linear = ((u > splat<T>(-3)) & (u < splat<T>(3))) ? splat<T>(T(1) / T(6)) : Vec<T>{};
    const Vec<T> slope = p.hard ? linear : s * (T(1) - s);
    store_n(kept.of_expanded + c, load_n(static_cast<const T*>(p.grad) + image * p.channels + c, n) * slope, n);
  }
  for (int64_t r = 0; r < p.reduced; ++r)
    kept.of_reduced[r] *= dot(kept.of_expanded, T(1), expand + r * p.channels, p.channels);
  for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
    const Vec<T> of_mean = combine(p, kept.of_reduced, static_cast<const T*>(p.reduce_weight), c, Vec<T>{});
    const Vec<T> count = splat<T>(static_cast<T>(p.count));
    store_n(static_cast<T*>(p.grad_sums) + image * p.channels + c, of_mean / count, p.channels - c);
  }
}

// Row r of both weights' gradients; images are added up in their order.
template <typename T>
void weight_row(const SqueezeExciteParams& p, int64_t r) {
  for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
    const int64_t n = p.channels - c;
    Vec<T> of_reduce{}, of_expand{};
    for (int64_t image = 0; image < p.batch; ++image) {
      const Kept<T> kept(p, image);
      const Vec<T> sums = load_n(static_cast<const T*>(p.sums) + image * p.channels + c, n);
      of_reduce += sums / splat<T>(static_cast<T>(p.count)) * splat<T>(kept.of_reduced[r]);
      of_expand += load_n(kept.of_expanded + c, n) * splat<T>(kept.hidden[r]);
    }
    store_n(static_cast<T*>(p.grad_reduce_weight) + r * p.channels + c, of_reduce, n);
    store_n(static_cast<T*>(p.grad_expand_weight) + r * p.channels + c, of_expand, n);
  }
}

template <typename T>
Status run_backward(const SqueezeExciteParams& p, int threads) {
  parallel_for(p.batch, threads, [&](int64_t image) { one_image_backward<T>(p, image); });
  parallel_for(p.reduced, threads, [&](int64_t r) { weight_row<T>(p, r); });
  T* of_reduce_bias = static_cast<T*>(p.grad_reduce_bias);
  T* of_expand_bias = static_cast<T*>(p.grad_expand_bias);
  std::memset(of_reduce_bias, 0, sizeof(T) * p.reduced);
  std::memset(of_expand_bias, 0, sizeof(T) * p.channels);
  for (int64_t image = 0; image < p.batch; ++image) {
    const Kept<T> kept(p, image);
    for (int64_t r = 0; r < p.reduced; ++r) of_reduce_bias[r] += kept.of_reduced[r];
    for (int64_t c = 0; c < p.channels; ++c) of_expand_bias[c] += kept.of_expanded[c];
  }
  return kOk;
}

}  // namespace

Status squeeze_excite(const SqueezeExciteParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  return kBadDtype;
}

Status squeeze_excite_backward(const SqueezeExciteParams& p, int threads) {
  if (p.dtype == kFloat32) return run_backward<float>(p, threads);
  if (p.dtype == kFloat64) return run_backward<double>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
