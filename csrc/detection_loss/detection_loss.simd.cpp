// Focal and huber loss of one level. A logit of its anchor's class is mirrored, so that one formula serves both kinds;
// losses of a pixel are added up in vectors, those of a block of pixels and of all blocks in double precision, in
// order.
#include "common/parallel_for.h"
#include "cpu/activation.h"
#include "detection_loss/params.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

// log(1 + e) for e in [0, 1]: twice the series of atanh(e / (2 + e)), to 1e-9 of itself.
EFFDET_INLINE Vec<float> log_one_plus(Vec<float> e) {
  const Vec<float> z = e * reciprocal(e + 2.0f), s = z * z;
  Vec<float> p = s * (1.0f / 15) + 1.0f / 13;
  p = p * s + 1.0f / 11;
  p = p * s + 1.0f / 9;
  p = p * s + 1.0f / 7;
  p = p * s + 1.0f / 5;
  p = p * s + 1.0f / 3;
  return 2.0f * z + 2.0f * z * (p * s);
}
EFFDET_INLINE Vec<double> log_one_plus(Vec<double> e) {
  Vec<double> y{};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_log1p(e[i]);
  return y;
}

template <typename A>
struct Focal {
  A gamma, near, far;  // near: 1 - smoothing / 2, far: smoothing / 2
};

// Of a logit x whose probability should be 0; the parts that loss and derivative share.
template <typename A>
struct Example {
  Vec<A> modulator, entropy, probability, rest;  // sigmoid(x)^gamma, cross-entropy, sigmoid(x), sigmoid(-x)

  EFFDET_INLINE Example(Vec<A> x, const Focal<A>& focal) {
    const Vec<A> zero{}, largest = splat<A>(Exponents<A>::kLargest);
    const Vec<A> e = exponential(lower(x > zero ? -x : x, -largest));
    const Vec<A> tail = log_one_plus(e), r = reciprocal(e + A(1));
    const Vec<A> log_p = upper(x, zero) - tail, log_rest = upper(-x, zero) - tail;
    entropy = -focal.near * log_rest - focal.far * log_p;
    const Vec<A> power = focal.gamma * log_p;
    modulator = power < -largest ? zero : exponential(lower(power, -largest));
    probability = x > zero ? r : e * r;
    rest = x > zero ? e * r : r;
  }
  EFFDET_INLINE Vec<A> loss() const { return modulator * entropy; }
  EFFDET_INLINE Vec<A> slope(const Focal<A>& focal) const {
    return modulator * (focal.gamma * rest * entropy + (focal.near * probability - focal.far * rest));
  }
};

// Calls use(offset, elements, x, sign, weight) for the vectors of one anchor's logits: sign is -1 for the class
// `label`, else 1; weight is what the loss is multiplied by, 0 beyond the last class.
template <typename T, typename Use>
EFFDET_INLINE void each_logit(const DetectionLossParams& p, const T* logits, int64_t label, const Use& use) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int kL = kLanes<T>;
  const A of_class = label == -2 ? A(0) : static_cast<A>(p.alpha), of_rest = label == -2 ? A(0) : A(1 - p.alpha);
  for (int64_t c = 0; c < p.classes; c += kL) {
    const int64_t n = p.classes - c;
    V sign = splat<A>(A(1)), weight = splat<A>(of_rest);
    const bool here = label >= c && label - c < kL;
    if (here || n < kL) {
      alignas(64) A signs[kL], weights[kL];
      for (int i = 0; i < kL; ++i) {
        const bool own = label == c + i;
        signs[i] = own ? A(-1) : A(1);
        weights[i] = i >= n ? A(0) : own ? of_class : of_rest;
      }
      sign = load(signs);
      weight = load(weights);
    }
    use(c, n, load_n(logits + c, n), sign, weight);
  }
}

template <typename A>
EFFDET_INLINE double total(Vec<A> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += static_cast<double>(v[i]);
  return sum;
}

// One image's pixels of a block.
template <typename T>
struct Block {
  int64_t image, first, count;
  const T* logits;
  const T* codes;
  const int64_t* labels;
  const Acc<T>* targets;

  EFFDET_INLINE Block(const DetectionLossParams& p, int64_t index) {
    const int64_t per_image = divide_up(p.pixels, kLossBlock);
    image = index / per_image;
    first = index % per_image * kLossBlock;
    count = least(kLossBlock, p.pixels - first);
    logits = static_cast<const T*>(p.logits) + image * p.logit_batch_stride + first * p.logit_pixel_stride;
    codes = static_cast<const T*>(p.codes) + image * p.code_batch_stride + first * p.code_pixel_stride;
    labels = p.labels + image * p.label_batch_stride + first * p.anchors;
    targets = static_cast<const Acc<T>*>(p.targets) + image * p.target_batch_stride + first * p.anchors * 4;
  }
};

template <typename A>
EFFDET_INLINE Focal<A> focal_of(const DetectionLossParams& p) {
  return {static_cast<A>(p.gamma), static_cast<A>(1 - p.smoothing / 2), static_cast<A>(p.smoothing / 2)};
}

// The difference of code and target, and 0 where the target is 0; `bounded` to +-delta.
template <typename A>
EFFDET_INLINE Vec<A> bounded(Vec<A> error, A delta) {
  return upper(lower(error, splat<A>(-delta)), splat<A>(delta));
}

template <typename T>
void block_loss(const DetectionLossParams& p, int64_t index) {
  using A = Acc<T>;
  using V = Vec<A>;
  const Block<T> block(p, index);
  const Focal<A> focal = focal_of<A>(p);
  const A delta = static_cast<A>(p.delta);
  const int64_t boxes = p.anchors * 4;
  double of_classes = 0, of_boxes = 0;
  for (int64_t i = 0; i < block.count; ++i) {
    V sum{};
    for (int64_t a = 0; a < p.anchors; ++a) {
      const T* logits = block.logits + i * p.logit_pixel_stride + a * p.classes;
      each_logit<T>(p, logits, block.labels[i * p.anchors + a],
                    [&](int64_t, int64_t, V x, V sign, V weight)
                        __attribute__((always_inline)) { sum += weight * Example<A>(x * sign, focal).loss(); });
    }
    of_classes += total<A>(sum);
    sum = V{};
    for (int64_t c = 0; c < boxes; c += kLanes<T>) {
      const V target = load_n(block.targets + i * boxes + c, boxes - c);
      const V error = load_n(block.codes + i * p.code_pixel_stride + c, boxes - c) - target;
      const V size = error < V{} ? -error : error, inner = upper(size, splat<A>(delta));
      const V loss = A(0.5) * inner * inner + delta * (size - inner);
      sum += target != V{} ? loss : loss * A(0);  // a NaN stays
    }
    of_boxes += total<A>(sum);
  }
  p.partial[2 * index] = of_classes;
  p.partial[2 * index + 1] = of_boxes;
}

template <typename T>
void block_gradient(const DetectionLossParams& p, int64_t index) {
  using A = Acc<T>;
  using V = Vec<A>;
  const Block<T> block(p, index);
  const Focal<A> focal = focal_of<A>(p);
  const A delta = static_cast<A>(p.delta);
  const A of_classes = static_cast<const A*>(p.factors)[0], of_boxes = static_cast<const A*>(p.factors)[1];
  const int64_t boxes = p.anchors * 4, row = block.image * p.pixels + block.first;
  for (int64_t i = 0; i < block.count; ++i) {
    for (int64_t a = 0; a < p.anchors && p.grad_logits; ++a) {
      const T* logits = block.logits + i * p.logit_pixel_stride + a * p.classes;
      T* grad = static_cast<T*>(p.grad_logits) + ((row + i) * p.anchors + a) * p.classes;
      each_logit<T>(p, logits, block.labels[i * p.anchors + a],
                    [&](int64_t c, int64_t n, V x, V sign, V weight) __attribute__((always_inline)) {
                      const V slope = Example<A>(x * sign, focal).slope(focal);
                      store_n(grad + c, of_classes * (weight * sign) * slope, n);
                    });
    }
    for (int64_t c = 0; c < boxes && p.grad_codes; c += kLanes<T>) {
      const V target = load_n(block.targets + i * boxes + c, boxes - c);
      const V error = load_n(block.codes + i * p.code_pixel_stride + c, boxes - c) - target;
      const V slope = bounded<A>(error, delta);
      store_n(static_cast<T*>(p.grad_codes) + (row + i) * boxes + c, of_boxes * (target != V{} ? slope : slope * A(0)),
              boxes - c);
    }
  }
}

void label_range(const DetectionLossParams& p) {
  int64_t low = p.labels[0], high = p.labels[0];
  for (int64_t image = 0; image < p.batch; ++image) {
    const int64_t* labels = p.labels + image * p.label_batch_stride;
    for (int64_t i = 0; i < p.pixels * p.anchors; ++i) {
      low = least(low, labels[i]);
      high = most(high, labels[i]);
    }
  }
  p.range[0] = low;
  p.range[1] = high;
}

template <typename T>
Status forward(const DetectionLossParams& p, int threads) {
  const int64_t blocks = loss_blocks(p.batch, p.pixels);
  parallel_for(blocks, threads, [&](int64_t block) { block_loss<T>(p, block); });
  label_range(p);
  p.sums[0] = p.sums[1] = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    p.sums[0] += p.partial[2 * block];
    p.sums[1] += p.partial[2 * block + 1];
  }
  return kOk;
}

template <typename T>
Status backward(const DetectionLossParams& p, int threads) {
  parallel_for(loss_blocks(p.batch, p.pixels), threads, [&](int64_t block) { block_gradient<T>(p, block); });
  return kOk;
}

}  // namespace

Status detection_loss(const DetectionLossParams& p, int threads) {
  if (p.dtype == kFloat32) return forward<float>(p, threads);
  if (p.dtype == kFloat64) return forward<double>(p, threads);
  if (p.dtype == kBFloat16) return forward<BFloat16>(p, threads);
  return kBadDtype;
}

Status detection_loss_backward(const DetectionLossParams& p, int threads) {
  if (p.dtype == kFloat32) return backward<float>(p, threads);
  if (p.dtype == kFloat64) return backward<double>(p, threads);
  if (p.dtype == kBFloat16) return backward<BFloat16>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
