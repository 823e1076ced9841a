// The two small matrix-vector products of squeeze-excite; images in parallel.
#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/activation.h"
#include "squeeze_excite/params.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

template <typename T>
void one_image(const SqueezeExciteParams& p, int64_t image, T* hidden) {
  constexpr int kL = kLanes<T>;
  const T* sums = static_cast<const T*>(p.sums) + image * p.channels;
  const T* reduce = static_cast<const T*>(p.reduce_weight);
  const T* expand = static_cast<const T*>(p.expand_weight);
  const Vec<T> count = splat<T>(static_cast<T>(p.count));
  for (int64_t r = 0; r < p.reduced; ++r) {
    Vec<T> total{};
    for (int64_t c = 0; c < p.channels; c += kL) {
      const int64_t n = p.channels - c;
      total += load_n(sums + c, n) / count * load_n(reduce + r * p.channels + c, n);
    }
    T sum = static_cast<const T*>(p.reduce_bias)[r];
    for (int i = 0; i < kL; ++i) sum += total[i];
    hidden[r] = activate<T>(splat<T>(sum), p.act)[0];
  }
  for (int64_t c = 0; c < p.channels; c += kL) {
    const int64_t n = p.channels - c;
    Vec<T> value = load_n(static_cast<const T*>(p.expand_bias) + c, n);
    for (int64_t r = 0; r < p.reduced; ++r) value += load_n(expand + r * p.channels + c, n) * splat<T>(hidden[r]);
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

}  // namespace

Status squeeze_excite(const SqueezeExciteParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
