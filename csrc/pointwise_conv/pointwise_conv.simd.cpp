// 1x1 convolution: blocks of pixels times panels of packed weights. A gate scales the panel, once for a block.
#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/gemm.h"
#include "pointwise_conv/params.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

constexpr int64_t kBlock = 128;  // pixels that share a scaled panel

// The panel's weights times the gates of one image; k runs over in_channels.
template <typename T>
void scale_panel(const void* panel, const Acc<T>* gate, int64_t channels, int64_t width, void* scaled) {
  using A = Acc<T>;
  if constexpr (kPairs<T>) {
    const auto* from = static_cast<const BFloat16*>(panel);
    auto* to = static_cast<BFloat16*>(scaled);
    for (int64_t k = 0; k < channels; k += 2) {
      const std::uint32_t low = bit_cast<std::uint32_t>(gate[k]);
      const std::uint32_t high = k + 1 < channels ? bit_cast<std::uint32_t>(gate[k + 1]) : 0;
      alignas(64) std::uint32_t both[2 * kLanes<A>];
      for (int i = 0; i < 2 * kLanes<A>; i += 2) both[i] = low, both[i + 1] = high;
      const Vec<A> a = bit_cast<Vec<A>>(load(reinterpret_cast<const float*>(both)));
      for (int64_t v = 0; v < 2 * width; ++v) {
        store(to + v * kLanes<A>, load(from + v * kLanes<A>) * a);
      }
      from += 2 * width * kLanes<A>;
      to += 2 * width * kLanes<A>;
    }
  } else {
    const auto* from = static_cast<const A*>(panel);
    auto* to = static_cast<A*>(scaled);
    for (int64_t k = 0; k < channels; ++k) {
      const Vec<A> g = splat<A>(gate[k]);
      for (int64_t v = 0; v < width; ++v) store(to + v * kLanes<A>, load(from + v * kLanes<A>) * g);
      from += width * kLanes<A>;
      to += width * kLanes<A>;
    }
  }
}

template <typename T>
Status run(const PointwiseParams& p, int threads) {
  using A = Acc<T>;
  const Panels panels(vectors_of<T>(p.out_channels));
  const int64_t k = packed_length<T>(p.in_channels);
  const int64_t blocks = divide_up(p.pixels, kBlock);
  // Few blocks: the panels are shared out too. Results do not depend on how.
  const int64_t groups = least(panels.count, divide_up(int64_t{8} * threads, most<int64_t>(1, p.batch * blocks)));
  const int64_t scratch_bytes = p.gate ? kPanel * k * kPackedBytes<T> : 0;
  int status = kOk;
  parallel_for(p.batch * blocks * groups, threads, [&](int64_t item) {
    const int64_t group = item % groups, block = item / groups % blocks, image = item / groups / blocks;
    void* scaled = scratch_bytes ? thread_scratch(scratch_bytes) : nullptr;
    if (scratch_bytes && !scaled) {
      __atomic_store_n(&status, kOutOfMemory, __ATOMIC_RELAXED);
      return;
    }
    const TileRegisters<T> registers(p.in_channels);
    const int64_t first = block * kBlock, count = least(kBlock, p.pixels - first);
    const T* x = static_cast<const T*>(p.x) + image * p.x_batch_stride + first * p.x_pixel_stride;
    const int64_t row = image * p.pixels + first;
    for (int64_t panel = panels.count * group / groups; panel < panels.count * (group + 1) / groups; ++panel) {
      const int64_t start = panels.start(panel), width = panels.width(panel), channel = start * kLanes<T>;
      const void* weights = static_cast<const char*>(p.weights) + start * k * kPackedBytes<T>;
      if (p.gate) {
        scale_panel<T>(weights, static_cast<const A*>(p.gate) + image * p.in_channels, p.in_channels, width, scaled);
        weights = scaled;
      }
      Epilogue<T> out;
      out.scale = static_cast<const A*>(p.scale) + channel;
      out.shift = static_cast<const A*>(p.shift) + channel;
      out.act = p.act;
      out.channels = least(p.out_channels - channel, width * kLanes<T>);
      out.y = static_cast<T*>(p.y) + row * p.out_channels + channel;
      out.ldy = p.out_channels;
      out.ldr = p.residual_pixel_stride;
      out.residual = p.residual ? static_cast<const T*>(p.residual) + image * p.residual_batch_stride +
                                      first * p.residual_pixel_stride + channel
                                : nullptr;
      multiply_panel<T, T>({&x, 1, p.in_channels, p.x_pixel_stride, weights}, out, count, width);
    }
  });
  return static_cast<Status>(status);
}

}  // namespace

Status pointwise_conv(const PointwiseParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
