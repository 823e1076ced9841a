// Runs the kernels of one instruction set (EFFDET_ISA) on random problems in buffers of exactly the right size: built
// with AddressSanitizer and UndefinedBehaviorSanitizer, it ends with an error at the first stray access.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "batch_norm_act/params.h"
#include "common/activation_codes.h"
#include "common/dtype.h"
#include "common/parallel_for.h"
#include "cpu/elementwise.h"
#include "cpu/gradients.h"
#include "cpu/packing.h"
#include "dense_conv/params.h"
#include "detection_loss/params.h"
#include "expand_depthwise/params.h"
#include "label_anchors/params.h"
#include "label_anchors/workspace.h"
#include "pointwise_conv/params.h"
#include "separable_conv/params.h"
#include "squeeze_excite/params.h"

using namespace effdet;
namespace isa = effdet::EFFDET_ISA;
using std::int64_t;

namespace {

std::mt19937_64 random_bits(1);

int64_t pick(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(random_bits() % (most - least + 1));
}

// Memory of exactly `elements` numbers, freed with the buffer; random values between -1 and 1.
class Buffer {
 public:
  Buffer(int dtype, int64_t elements) : data_(std::malloc(elements * size_of(dtype) + (elements == 0))) {
    for (int64_t i = 0; i < elements; ++i) {
      const double value = static_cast<double>(pick(-1000, 1000)) / 1000;
      if (dtype == kFloat64) static_cast<double*>(data_.get())[i] = value;
      if (dtype == kFloat32) static_cast<float*>(data_.get())[i] = static_cast<float>(value);
      if (dtype == kBFloat16)
        static_cast<BFloat16*>(data_.get())[i].bits = static_cast<std::uint16_t>(0x3f80 + pick(0, 64));
    }
  }
  void* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

// Everything that one problem allocates.
struct Problem {
  int dtype = static_cast<int>(pick(0, 2));
  int accumulator = dtype == kFloat64 ? kFloat64 : kFloat32;
  int64_t batch = pick(1, 2), threads = pick(1, 3);
  std::vector<Buffer> buffers;

  void* data(int type, int64_t elements) {
    buffers.emplace_back(type, elements);
    return buffers.back().get();
  }
  void* bytes(int64_t count) { return data(kFloat64, (count + 7) / 8); }
  Map map(int64_t height, int64_t width, int64_t channels) {
    const int64_t pixel = channels + pick(0, 1) * pick(0, 5);
    // The last pixel ends the buffer.
    const int64_t elements = (batch * height * width - 1) * pixel + channels;
    return {data(dtype, elements), height, width, height * width * pixel, width * pixel, pixel};
  }
  void* vector(int64_t count) {
    const int64_t padded = (count + 15) / 16 * 16;
    return data(accumulator, padded);
  }
  void* dense_weight(int type, int64_t out, int64_t in, int64_t kernel) {
    void* packed = bytes(isa::packed_dense_bytes(type, out, kernel, kernel * in));
    const int64_t taps = kernel * kernel;
    const WeightParams p{
        data(type, out * in * taps), packed, out, in, kernel, kernel, in * taps, taps, kernel, 1, type};
    if (isa::pack_dense(p, static_cast<int>(threads)) != kOk) std::abort();
    return packed;
  }
  void* depthwise_weight(int64_t channels, int64_t kernel) {
    void* packed = bytes(isa::packed_depthwise_bytes(dtype, channels, kernel * kernel));
    const WeightParams p{data(dtype, channels * kernel * kernel),
                         packed,
                         channels,
                         1,
                         kernel,
                         kernel,
                         kernel * kernel,
                         kernel * kernel,
                         kernel,
                         1,
                         dtype};
    if (isa::pack_depthwise(p, static_cast<int>(threads)) != kOk) std::abort();
    return packed;
  }
};

bool pointwise() {
  Problem q;
  PointwiseParams p{};
  p.dtype = q.dtype, p.act = static_cast<int>(pick(0, kActivations - 1));
  p.batch = q.batch, p.in_channels = pick(1, 70), p.out_channels = pick(1, 120);
  const Map x = q.map(pick(1, 12), pick(1, 20), p.in_channels);
  p.pixels = x.height * x.width;
  const Map residual = q.map(x.height, x.width, p.out_channels);
  p.x = x.data, p.x_batch_stride = x.batch_stride, p.x_pixel_stride = x.pixel_stride;
  if (pick(0, 1)) p.residual = residual.data;
  p.residual_batch_stride = residual.batch_stride, p.residual_pixel_stride = residual.pixel_stride;
  if (pick(0, 1)) p.gate = q.data(q.accumulator, p.batch * p.in_channels);
  p.weights = q.dense_weight(q.dtype, p.out_channels, p.in_channels, 1);
  p.scale = q.vector(p.out_channels), p.shift = q.vector(p.out_channels);
  p.y = q.data(q.dtype, p.batch * p.pixels * p.out_channels);
  return isa::pointwise_conv(p, static_cast<int>(q.threads)) == kOk;
}

bool depthwise() {
  Problem q;
  ExpandDepthwiseParams p{};
  p.dtype = q.dtype, p.act = static_cast<int>(pick(0, kActivations - 1)), p.expand_act = p.act;
  p.batch = q.batch, p.channels = pick(1, 100), p.kernel = pick(1, 7), p.stride = pick(1, 3), p.dilation = 1;
  const bool expands = pick(0, 1);
  p.in_channels = expands ? pick(1, 40) : p.channels;
  p.x = q.map(pick(1, 24), pick(1, 70), p.in_channels);
  if (!expands && pick(0, 1)) p.dilation = pick(1, 3), p.stride = 1;
  p.left = pick(0, p.kernel - 1) - pick(0, 1), p.top = pick(0, p.kernel - 1) - pick(0, 1);
  const int64_t height = (p.x.height - 1) * p.dilation + 1, width = (p.x.width - 1) * p.dilation + 1;
  p.out_height = pick(1, height / p.stride + 2), p.out_width = pick(1, width / p.stride + 2);
  if (expands) {
    p.expand_weights = q.dense_weight(q.dtype, p.channels, p.in_channels, 1);
    p.expand_scale = q.vector(p.channels), p.expand_shift = q.vector(p.channels);
  }
  p.weights = q.depthwise_weight(p.channels, p.kernel);
  if (pick(0, 1)) p.scale = q.vector(p.channels), p.shift = q.vector(p.channels);
  p.y = q.data(q.dtype, p.batch * p.out_height * p.out_width * p.channels);
  if (pick(0, 1)) {
    p.row_sums = q.data(q.accumulator, p.batch * p.out_height * p.channels);
    p.y_sums = q.data(q.accumulator, p.batch * p.channels);
  }
  return isa::expand_depthwise(p, static_cast<int>(q.threads)) == kOk;
}

bool dense() {
  Problem q;
  DenseConvParams p{};
  p.dtype = q.dtype, p.act = static_cast<int>(pick(0, kActivations - 1));
  p.batch = q.batch, p.in_channels = pick(1, 20), p.out_channels = pick(1, 60);
  p.height = pick(1, 20), p.width = pick(1, 30), p.kernel = pick(1, 5), p.stride = pick(1, 3), p.dilation = pick(1, 2);
  p.left = pick(-1, p.kernel - 1), p.top = pick(-1, p.kernel - 1);
  p.out_height = pick(1, p.height * p.dilation / p.stride + 2);
  p.out_width = pick(1, p.width * p.dilation / p.stride + 2);
  const bool planes = pick(0, 1);  // NCHW
  p.x = q.data(q.dtype, p.batch * p.in_channels * p.height * p.width);
  p.batch_stride = p.in_channels * p.height * p.width;
  p.channel_stride = planes ? p.height * p.width : 1;
  p.pixel_stride = planes ? 1 : p.in_channels;
  p.row_stride = p.width * p.pixel_stride;
  p.weights = q.dense_weight(q.dtype, p.out_channels, p.in_channels, p.kernel);
  p.scale = q.vector(p.out_channels), p.shift = q.vector(p.out_channels);
  p.y = q.data(q.dtype, p.batch * p.out_height * p.out_width * p.out_channels);
  return isa::dense_conv(p, static_cast<int>(q.threads)) == kOk;
}

Fusion fusion_of(Problem& q, int64_t height, int64_t width, int64_t channels, Map* maps) {
  Fusion fusion{};
  fusion.count = pick(1, kMaxFused);
  fusion.method = static_cast<int>(pick(0, kFusionMethods - 1));
  fusion.weight = fusion.method == kSum ? nullptr : q.data(q.accumulator, fusion.count);
  fusion.pool_left = pick(0, 2), fusion.pool_top = pick(0, 2);
  for (int64_t i = 0; i < fusion.count; ++i) {
    fusion.resample[i] = static_cast<int>(pick(kIdentity, kMaxPool));
    const bool same = fusion.resample[i] == kIdentity;
    maps[i] = q.map(same ? height : pick(1, 30), same ? width : pick(1, 30), channels);
  }
  return fusion;
}

bool fusion() {
  Problem q;
  WeightedFusionParams p{};
  p.dtype = q.dtype, p.act = static_cast<int>(pick(0, kActivations - 1));
  p.batch = q.batch, p.channels = pick(1, 70), p.height = pick(1, 14), p.width = pick(1, 14);
  p.fusion = fusion_of(q, p.height, p.width, p.channels, p.x);
  p.y = q.data(q.dtype, p.batch * p.height * p.width * p.channels);
  if (isa::weighted_fusion(p, static_cast<int>(q.threads)) != kOk) return false;
  if (q.dtype == kBFloat16) return true;
  FusionGradientParams g{};
  g.dtype = p.dtype, g.batch = p.batch, g.channels = p.channels, g.fusion = p.fusion;
  for (int i = 0; i < p.fusion.count; ++i) {
    g.x[i] = p.x[i];
    if (pick(0, 3)) g.grad_x[i] = q.data(q.dtype, p.batch * p.x[i].height * p.x[i].width * p.channels);
  }
  g.grad = q.map(p.height, p.width, p.channels);
  g.grad_weight = p.fusion.weight ? q.data(q.accumulator, p.fusion.count) : nullptr;
  g.partial = q.data(kFloat64, p.batch * p.channels * p.fusion.count);
  return isa::weighted_fusion_gradient(g, static_cast<int>(q.threads)) == kOk;
}

bool separable() {
  Problem q;
  SeparableParams p{};
  p.dtype = q.dtype, p.act = static_cast<int>(pick(0, 6)), p.pre_act = static_cast<int>(pick(0, 6));
  p.batch = q.batch, p.channels = pick(1, 80), p.count = pick(1, 4);
  for (int64_t i = 0; i < p.count; ++i) {
    SeparableOutput& o = p.outputs[i];
    o.height = pick(1, 14), o.width = pick(1, 60), o.out_channels = pick(1, 110), o.kernel = 2 * pick(0, 3) + 1;
    if (i == 0) {
      p.fusion = fusion_of(q, o.height, o.width, p.channels, o.x);
    } else {
      for (int m = 0; m < p.fusion.count; ++m)
        o.x[m] = p.fusion.resample[m] == kIdentity ? q.map(o.height, o.width, p.channels) : p.outputs[0].x[m];
    }
    o.dw_weights = q.depthwise_weight(p.channels, o.kernel);
    o.pw_weights = q.dense_weight(isa::separable_product_dtype(q.dtype), o.out_channels, p.channels, 1);
    o.scale = q.vector(o.out_channels), o.shift = q.vector(o.out_channels);
    o.y = q.data(q.dtype, p.batch * o.height * o.width * o.out_channels);
  }
  return isa::separable_conv(p, static_cast<int>(q.threads)) == kOk;
}

bool excite() {
  Problem q;
  SqueezeExciteParams p{};
  p.dtype = q.accumulator, p.act = static_cast<int>(pick(0, 6)), p.hard = static_cast<int>(pick(0, 1));
  p.batch = q.batch, p.channels = pick(1, 90), p.reduced = pick(1, 20), p.count = pick(1, 99);
  p.sums = q.data(p.dtype, p.batch * p.channels), p.gates = q.data(p.dtype, p.batch * p.channels);
  p.reduce_weight = q.data(p.dtype, p.reduced * p.channels), p.reduce_bias = q.data(p.dtype, p.reduced);
  p.expand_weight = q.data(p.dtype, p.reduced * p.channels), p.expand_bias = q.data(p.dtype, p.channels);
  if (isa::squeeze_excite(p, static_cast<int>(q.threads)) != kOk) return false;
  p.grad = q.data(p.dtype, p.batch * p.channels), p.grad_sums = q.data(p.dtype, p.batch * p.channels);
  p.grad_reduce_weight = q.data(p.dtype, p.reduced * p.channels), p.grad_reduce_bias = q.data(p.dtype, p.reduced);
  p.grad_expand_weight = q.data(p.dtype, p.reduced * p.channels), p.grad_expand_bias = q.data(p.dtype, p.channels);
  p.partial = q.data(p.dtype, p.batch * (2 * p.reduced + p.channels));
  return isa::squeeze_excite_backward(p, static_cast<int>(q.threads)) == kOk;
}

bool norm() {
  Problem q;
  BatchNormParams p{};
  p.dtype = q.dtype, p.act = static_cast<int>(pick(0, 6)), p.eps = 1e-3;
  p.batch = q.batch, p.channels = pick(1, 100);
  const Map x = q.map(pick(1, 20), pick(1, 40), p.channels);
  p.pixels = x.height * x.width;
  p.x = x.data, p.x_batch_stride = x.batch_stride, p.x_pixel_stride = x.pixel_stride;
  p.weight = q.data(q.accumulator, p.channels), p.bias = q.data(q.accumulator, p.channels);
  p.mean = q.data(q.accumulator, p.channels), p.variance = q.data(q.accumulator, p.channels);
  p.partial = q.bytes(batch_norm_workspace(p.batch, p.pixels, p.channels));
  p.y = q.data(q.dtype, p.batch * p.pixels * p.channels);
  if (isa::batch_norm_act(p, static_cast<int>(q.threads)) != kOk) return false;
  p.given = 1;  // the same statistics once more
  if (isa::batch_norm_act(p, static_cast<int>(q.threads)) != kOk) return false;
  if (q.dtype == kBFloat16) return true;
  const Map grad = q.map(x.height, x.width, p.channels);
  p.grad = grad.data, p.grad_batch_stride = grad.batch_stride, p.grad_pixel_stride = grad.pixel_stride;
  p.grad_weight = q.data(q.accumulator, p.channels), p.grad_bias = q.data(q.accumulator, p.channels);
  p.given = 0;
  if (isa::batch_norm_act_backward(p, static_cast<int>(q.threads)) != kOk) return false;
  p.given = 1;  // dx alone, then the sums alone
  if (isa::batch_norm_act_backward(p, static_cast<int>(q.threads)) != kOk) return false;
  p.given = 0, p.y = nullptr;
  return isa::batch_norm_act_backward(p, static_cast<int>(q.threads)) == kOk;
}

bool loss() {
  Problem q;
  DetectionLossParams p{};
  p.dtype = q.dtype, p.batch = q.batch, p.anchors = pick(1, 9), p.classes = pick(1, 40);
  const Map logits = q.map(pick(1, 8), pick(1, 10), p.anchors * p.classes);
  const Map codes = q.map(logits.height, logits.width, p.anchors * 4);
  p.pixels = logits.height * logits.width;
  p.logits = logits.data, p.logit_batch_stride = logits.batch_stride, p.logit_pixel_stride = logits.pixel_stride;
  p.codes = codes.data, p.code_batch_stride = codes.batch_stride, p.code_pixel_stride = codes.pixel_stride;
  const int64_t anchors = p.pixels * p.anchors, blocks = loss_blocks(p.batch, p.pixels);
  auto* labels = static_cast<int64_t*>(q.bytes(p.batch * anchors * 8));
  for (int64_t i = 0; i < p.batch * anchors; ++i) labels[i] = pick(-2, p.classes);  // the largest is no class
  p.labels = labels, p.label_batch_stride = anchors;
  p.targets = q.data(q.accumulator, p.batch * anchors * 4), p.target_batch_stride = anchors * 4;
  p.alpha = 0.25, p.gamma = 1.5, p.delta = 0.1, p.smoothing = 0.1;
  p.sums = static_cast<double*>(q.bytes(16)), p.range = static_cast<int64_t*>(q.bytes(16));
  p.partial = static_cast<double*>(q.bytes(blocks * 16));
  if (isa::detection_loss(p, static_cast<int>(q.threads)) != kOk) return false;
  p.factors = q.data(q.accumulator, 2);
  p.grad_logits = q.data(q.dtype, p.batch * anchors * p.classes);
  p.grad_codes = q.data(q.dtype, p.batch * anchors * 4);
  return isa::detection_loss_backward(p, static_cast<int>(q.threads)) == kOk;
}

bool labels() {
  Problem q;
  if (q.dtype == kBFloat16) return true;
  LabelAnchorsParams p{};
  p.dtype = q.dtype, p.batch = q.batch, p.count = pick(1, 40), p.total = pick(1, 1500), p.parts = pick(1, 4);
  p.threshold = static_cast<double>(pick(0, 4)) / 4;
  p.boxes = q.data(q.dtype, p.batch * p.count * 4), p.anchors = q.data(q.dtype, p.total * 4);
  auto* classes = static_cast<int64_t*>(q.bytes(p.batch * p.count * 8));
  for (int64_t i = 0; i < p.batch * p.count; ++i) classes[i] = pick(-2, 9);
  p.classes = classes;
  p.labels = static_cast<int64_t*>(q.bytes(p.batch * p.total * 8)), p.codes = q.data(q.dtype, p.batch * p.total * 4);
  p.positives = q.data(q.dtype, p.batch), p.infinite = static_cast<int64_t*>(q.bytes(8));
  p.workspace = q.bytes(label_workspace_bytes(q.dtype, p.batch, p.count, p.total, p.parts));
  return isa::label_anchors(p, static_cast<int>(q.threads)) == kOk && *p.infinite == 0;
}

bool gradients() {
  Problem q;
  if (q.dtype == kBFloat16) return true;
  const int64_t channels = pick(1, 80), other = pick(1, 40);
  const Map grad = q.map(pick(1, 20), pick(1, 40), channels), z = q.map(grad.height, grad.width, channels);
  const int64_t pixels = grad.height * grad.width, blocks = gradient_blocks(q.batch, pixels);
  const int threads = static_cast<int>(q.threads);
  AffineGradientParams a{};
  a.dtype = q.dtype, a.act = static_cast<int>(pick(0, 6)), a.batch = q.batch, a.pixels = pixels, a.channels = channels;
  a.grad = grad.data, a.grad_batch_stride = grad.batch_stride, a.grad_pixel_stride = grad.pixel_stride;
  a.z = z.data, a.z_batch_stride = z.batch_stride, a.z_pixel_stride = z.pixel_stride;
  a.scale = q.vector(channels), a.shift = q.vector(channels);
  a.delta = q.data(q.dtype, q.batch * pixels * channels);
  a.grad_scale = q.data(q.dtype, channels), a.grad_shift = q.data(q.dtype, channels);
  a.partial = q.data(q.dtype, blocks * 2 * channels);
  GateGradientParams g{};
  g.dtype = q.dtype, g.batch = q.batch, g.pixels = pixels, g.channels = channels;
  g.grad = a.delta, g.x = z.data, g.x_batch_stride = z.batch_stride, g.x_pixel_stride = z.pixel_stride;
  g.gate = q.data(q.dtype, q.batch * channels), g.grad_gate = q.data(q.dtype, q.batch * channels);
  g.partial = q.data(q.dtype, blocks * channels);
  ProductGradientParams p{};
  p.dtype = q.dtype, p.batch = q.batch, p.rows = channels, p.columns = other,
  p.transposed = static_cast<int>(pick(0, 1));
  p.a = grad, p.b = q.map(grad.height, grad.width, other);
  p.gate = q.data(q.dtype, q.batch * other), p.out = q.data(q.dtype, channels * other);
  p.partial = q.data(q.dtype, product_segments(q.batch, grad.height, grad.width) * channels * other);
  DepthwiseGradientParams d{};
  d.dtype = q.dtype, d.batch = q.batch, d.channels = channels, d.kernel = pick(1, 7), d.stride = pick(1, 3);
  d.left = pick(0, d.kernel - 1), d.top = pick(0, d.kernel - 1);
  d.x = q.map(pick(1, 40), pick(1, 60), channels), d.grad = grad;
  d.out = q.data(q.dtype, d.kernel * d.kernel * channels);
  const int64_t strips = (grad.height + kStripRows - 1) / kStripRows;
  d.partial = q.data(q.dtype, q.batch * strips * d.kernel * d.kernel * channels);
  return isa::affine_gradient(a, threads) == kOk && isa::gate_gradient(g, threads) == kOk &&
         isa::product_gradient(p, threads) == kOk && isa::depthwise_gradient(d, threads) == kOk;
}

// Each item once, whatever threads there are and however long an item takes.
bool loops() {
  const int64_t count = pick(0, 300), slow = pick(0, 300);
  std::vector<int> times(static_cast<std::size_t>(count));
  parallel_for(count, static_cast<int>(pick(1, 9) == 9 ? 70 : pick(1, 5)), [&](int64_t i) {
    volatile int64_t work = i == slow ? 20000 : 10;
    while (work > 0) work = work - 1;
    __atomic_fetch_add(&times[static_cast<std::size_t>(i)], 1, __ATOMIC_RELAXED);
  });
  for (const int n : times)
    if (n != 1) return false;
  return true;
}

bool elementwise() {
  Problem q;
  ElementwiseParams e{};
  e.dtype = q.dtype, e.kind = static_cast<int>(pick(kAdded, kBetween)),
  e.factor = 0.25 * static_cast<double>(pick(-4, 4));
  e.outer = q.batch, e.middle = pick(1, 500), e.inner = pick(1, 90);
  const int64_t elements = e.outer * e.middle * e.inner;
  e.a = q.data(q.dtype, elements);
  const bool spread = pick(0, 1);
  e.b_outer_stride = spread ? e.inner : e.middle * e.inner, e.b_middle_stride = spread ? 0 : e.inner;
  e.b = e.kind == kScaled ? nullptr : q.data(q.dtype, spread ? e.outer * e.inner : elements);
  e.out = pick(0, 1) ? const_cast<void*>(e.a) : q.data(q.dtype, elements);
  TransposeParams t{};
  t.dtype = q.dtype, t.rows = pick(1, 200), t.columns = pick(1, 200);
  t.x = q.data(q.dtype, t.rows * t.columns), t.out = q.data(q.dtype, t.rows * t.columns);
  const int threads = static_cast<int>(q.threads);
  return isa::elementwise(e, threads) == kOk && isa::transpose(t, threads) == kOk;
}

}  // namespace

int main() {
  effdet::current_isa();  // asks for the registers that a set needs
  bool (*const kernels[])() = {pointwise, depthwise, dense,  fusion,    separable,   excite,
                               norm,      loss,      labels, gradients, elementwise, loops};
  for (int i = 0; i < 150; ++i)
    for (const auto kernel : kernels)
      if (!kernel()) {
        std::printf("problem %d: a kernel refused it\n", i);
        return 1;
      }
  std::puts("ok");
}
