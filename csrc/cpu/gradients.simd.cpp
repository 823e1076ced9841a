#include "cpu/gradients.h"

#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/depthwise.h"
#include "cpu/derivative.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

// out[r, c], or out[c, r] if transposed, = sum over parts of partial[part, r, c], in order.
template <typename A>
void add_parts(const void* partial, int64_t parts, int64_t rows, int64_t columns, bool transposed, void* out,
               int threads) {
  constexpr int64_t kShare = 1024;
  const int64_t size = rows * columns;
  parallel_for(divide_up(size, kShare), threads, [&](int64_t share) {
    for (int64_t i = share * kShare; i < least((share + 1) * kShare, size); i += kLanes<A>) {
      const int64_t n = least(size, (share + 1) * kShare) - i;
      Vec<A> sum{};
      for (int64_t part = 0; part < parts; ++part) sum += load_n(static_cast<const A*>(partial) + part * size + i, n);
      if (!transposed) {
        store_n(static_cast<A*>(out) + i, sum, n);
        continue;
      }
      for (int64_t l = 0; l < least<int64_t>(n, kLanes<A>); ++l)
        static_cast<A*>(out)[(i + l) % columns * rows + (i + l) / columns] = sum[static_cast<int>(l)];
    }
  });
}

template <typename T>
Status affine(const AffineGradientParams& p, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t per_image = divide_up(p.pixels, kGradientBlock), blocks = p.batch * per_image;
  parallel_for(blocks, threads, [&](int64_t block) {
    const int64_t image = block / per_image, first = block % per_image * kGradientBlock;
    const int64_t count = least(kGradientBlock, p.pixels - first);
    const T* grad = static_cast<const T*>(p.grad) + image * p.grad_batch_stride + first * p.grad_pixel_stride;
    const T* z = p.z ? static_cast<const T*>(p.z) + image * p.z_batch_stride + first * p.z_pixel_stride : nullptr;
    T* delta = p.delta ? static_cast<T*>(p.delta) + (image * p.pixels + first) * p.channels : nullptr;
    A* partial = static_cast<A*>(p.partial) + block * 2 * p.channels;
    for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
      const int64_t n = p.channels - c;
      const V scale = load(static_cast<const A*>(p.scale) + c), shift = load(static_cast<const A*>(p.shift) + c);
      V of_scale{}, of_shift{};
      for (int64_t i = 0; i < count; ++i) {
        V d = load_n(grad + i * p.grad_pixel_stride + c, n);
        if (z) {
          const V value = load_n(z + i * p.z_pixel_stride + c, n);
          d *= derivative<A>(value * scale + shift, p.act);
          of_scale += d * value;
        }
        of_shift += d;
        if (delta) store_n(delta + i * p.channels + c, d * scale, n);
      }
      store_n(partial + c, of_scale, n);
      store_n(partial + p.channels + c, of_shift, n);
    }
  });
  // [blocks, 2, channels]: the sums of both lie next to each other.
  const A* partial = static_cast<const A*>(p.partial);
  for (int64_t c = 0; c < p.channels; ++c) {
    double of_scale = 0, of_shift = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      of_scale += partial[block * 2 * p.channels + c];
      of_shift += partial[(block * 2 + 1) * p.channels + c];
    }
    if (p.grad_scale) static_cast<A*>(p.grad_scale)[c] = static_cast<A>(of_scale);
    if (p.grad_shift) static_cast<A*>(p.grad_shift)[c] = static_cast<A>(of_shift);
  }
  return kOk;
}

// kCount rows of a times kWidth vectors of b, summed over `lines` rows of pixels, gated, then put into `out` or added.
template <typename T, int kCount, int kWidth>
void product_tile(const ProductGradientParams& p, const T* a, const T* b, int64_t lines, const Acc<T>* gate,
                  int64_t columns, bool adds, Acc<T>* out) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int kL = kLanes<T>;
  V sum[kCount][kWidth] = {};
  const int64_t last = columns - (kWidth - 1) * kL;
  for (int64_t line = 0; line < lines; ++line) {
    const T* left = a + line * p.a.row_stride;
    const T* right = b + line * p.b.row_stride;
    for (int64_t w = 0; w < p.a.width; ++w) {
      V value[kWidth];
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) value[v] = load_n(right + v * kL, v == kWidth - 1 ? last : kL);
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) {
        const V factor = splat<A>(widen(left[m]));
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) sum[m][v] = factor * value[v] + sum[m][v];
      }
      left += p.a.pixel_stride;
      right += p.b.pixel_stride;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kCount; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) {
      const int64_t n = v == kWidth - 1 ? last : kL;
      A* to = out + m * p.columns + v * kL;
      V value = sum[m][v];
      if (gate) value *= load_n(gate + v * kL, n);
      if (adds) value += load_n(to, n);
      store_n(to, value, n);
    }
}

template <typename T, int kWidth>
EFFDET_INLINE void product_rows(const ProductGradientParams& p, const T* a, const T* b, int64_t lines,
                                const Acc<T>* gate, int64_t columns, bool adds, Acc<T>* out) {
  int64_t row = 0;
  for (; row + kRows <= p.rows; row += kRows)
    product_tile<T, kRows, kWidth>(p, a + row, b, lines, gate, columns, adds, out + row * p.columns);
  for (; row + 2 <= p.rows; row += 2)
    product_tile<T, 2, kWidth>(p, a + row, b, lines, gate, columns, adds, out + row * p.columns);
  if (row < p.rows) product_tile<T, 1, kWidth>(p, a + row, b, lines, gate, columns, adds, out + row * p.columns);
}

template <typename T>
Status product(const ProductGradientParams& p, int threads) {
  using A = Acc<T>;
  constexpr int64_t kPixels = 128;  // whose vectors of b stay in the first cache while the rows of a go by
  const int64_t lines = segment_rows(p.a.width), per_image = divide_up(p.a.height, lines);
  const int64_t step = least(lines, divide_up(kPixels, p.a.width));
  const int64_t segments = p.batch * per_image, vectors = divide_up(p.columns, kLanes<T>);
  const int64_t panels = divide_up(vectors, 3);
  parallel_for(segments * panels, threads, [&](int64_t item) {
    const int64_t panel = item % panels, segment = item / panels;
    const int64_t image = segment / per_image, begin = segment % per_image * lines;
    const int64_t end = least(begin + lines, p.a.height);
    const int64_t first = vectors * panel / panels, width = vectors * (panel + 1) / panels - first;
    const int64_t column = first * kLanes<T>, columns = least(p.columns - column, width * kLanes<T>);
    const A* gate = p.gate ? static_cast<const A*>(p.gate) + image * p.columns + column : nullptr;
    A* out = static_cast<A*>(p.partial) + segment * p.rows * p.columns + column;
    for (int64_t line = begin; line < end; line += step) {
      const T* a = static_cast<const T*>(p.a.data) + image * p.a.batch_stride + line * p.a.row_stride;
      const T* b = static_cast<const T*>(p.b.data) + image * p.b.batch_stride + line * p.b.row_stride + column;
      const int64_t count = least(step, end - line);
      const bool adds = line > begin;
      if (width == 1) product_rows<T, 1>(p, a, b, count, gate, columns, adds, out);
      if (width == 2) product_rows<T, 2>(p, a, b, count, gate, columns, adds, out);
      if (width == 3) product_rows<T, 3>(p, a, b, count, gate, columns, adds, out);
    }
  });
  add_parts<A>(p.partial, segments, p.rows, p.columns, p.transposed, p.out, threads);
  return kOk;
}

template <typename T>
Status gate(const GateGradientParams& p, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  const int64_t per_image = divide_up(p.pixels, kGradientBlock);
  parallel_for(p.batch * per_image, threads, [&](int64_t block) {
    const int64_t image = block / per_image, first = block % per_image * kGradientBlock;
    const int64_t count = least(kGradientBlock, p.pixels - first);
    T* grad = static_cast<T*>(p.grad) + (image * p.pixels + first) * p.channels;
    const T* x = static_cast<const T*>(p.x) + image * p.x_batch_stride + first * p.x_pixel_stride;
    for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
      const int64_t n = p.channels - c;
      const V factor = load_n(static_cast<const A*>(p.gate) + image * p.channels + c, n);
      V sum{};
      for (int64_t i = 0; i < count; ++i) {
        const V g = load_n(grad + i * p.channels + c, n);
        sum += g * load_n(x + i * p.x_pixel_stride + c, n);
        store_n(grad + i * p.channels + c, g * factor, n);
      }
      store_n(static_cast<A*>(p.partial) + block * p.channels + c, sum, n);
    }
  });
  parallel_for(p.batch, threads, [&](int64_t image) {
    const A* partial = static_cast<const A*>(p.partial) + image * per_image * p.channels;
    add_parts<A>(partial, per_image, 1, p.channels, false, static_cast<A*>(p.grad_gate) + image * p.channels, 1);
  });
  return kOk;
}

// The sums of one vector of channels over one row: sums[i * k + j] += grad[w] * rows[i][w * stride + j], for kLines
// rows i at a time, whose sums stay in registers.
template <typename A, int kK, int kLines>
EFFDET_INLINE void correlate_row(const A* const* rows, const A* grad, int64_t count, int64_t stride, int64_t width,
                                 Vec<A>* sums) {
  using V = Vec<A>;
  static_assert(kK % kLines == 0, "whole groups of rows");
#pragma GCC unroll 1
  for (int i = 0; i < kK; i += kLines) {
    V sum[kLines * kK];
#pragma GCC unroll 32
    for (int j = 0; j < kLines * kK; ++j) sum[j] = sums[i * kK + j];
    const A* x[kLines];
#pragma GCC unroll 8
    for (int l = 0; l < kLines; ++l) x[l] = rows[i + l];
    for (int64_t w = 0; w < count; ++w) {
      const V g = load(grad + w * width);
      const int64_t at = w * stride * width;
#pragma GCC unroll 8
      for (int l = 0; l < kLines; ++l)
#pragma GCC unroll 8
        for (int j = 0; j < kK; ++j) sum[l * kK + j] = g * load(x[l] + at + j * width) + sum[l * kK + j];
    }
#pragma GCC unroll 32
    for (int j = 0; j < kLines * kK; ++j) sums[i * kK + j] = sum[j];
  }
}

template <typename T>
Status depthwise(const DepthwiseGradientParams& p, int threads) {
  using A = Acc<T>;
  using V = Vec<A>;
  constexpr int kL = kLanes<T>;
  const int64_t vectors = divide_up(p.channels, kL), strips = divide_up(p.grad.height, kStripRows);
  const int64_t taps = p.kernel * p.kernel;
  const int64_t places = (p.grad.width - 1) * p.stride + p.kernel;
  const int64_t elements = Ring<A>::size(p.kernel, places, kL) + (p.grad.width + taps) * kL;
  int status = kOk;
  parallel_for(p.batch * strips * vectors, threads, [&](int64_t item) {
    A* memory = static_cast<A*>(thread_scratch(elements * sizeof(A)));
    if (!memory) {
      __atomic_store_n(&status, kOutOfMemory, __ATOMIC_RELAXED);
      return;
    }
    const int64_t c = item % vectors * kL, strip = item / vectors % strips, image = item / vectors / strips;
    const int64_t n = p.channels - c;
    const Ring<A> ring(memory, p.kernel, places, kL);
    ring.clear();
    A* grad = memory + Ring<A>::size(p.kernel, places, kL);
    V* sums = reinterpret_cast<V*>(grad + p.grad.width * kL);
    for (int64_t t = 0; t < taps; ++t) sums[t] = V{};
    const T* x = static_cast<const T*>(p.x.data) + image * p.x.batch_stride + c;
    const T* g = static_cast<const T*>(p.grad.data) + image * p.grad.batch_stride + c;
    const int64_t from = most<int64_t>(-p.left, 0), to = least(places - p.left, p.x.width);
    const int64_t end = least((strip + 1) * kStripRows, p.grad.height);
    int64_t made = most<int64_t>(0, strip * kStripRows * p.stride - p.top);
    const A* rows[kMaxKernel];
    for (int64_t row = strip * kStripRows; row < end; ++row) {
      const int64_t h = row * p.stride - p.top;
      made = most(made, h);
      for (; made < least(h + p.kernel, p.x.height); ++made)
        for (int64_t w = from; w < to; ++w)
          store(ring.row(made) + (w + p.left) * kL, load_n(x + made * p.x.row_stride + w * p.x.pixel_stride, n));
      for (int64_t i = 0; i < p.kernel; ++i) rows[i] = h + i >= 0 && h + i < p.x.height ? ring.row(h + i) : ring.zeros;
      for (int64_t w = 0; w < p.grad.width; ++w)
        store(grad + w * kL, load_n(g + row * p.grad.row_stride + w * p.grad.pixel_stride, n));
      if (p.kernel == 3) {
        correlate_row<A, 3, 3>(rows, grad, p.grad.width, p.stride, kL, sums);
      } else if (p.kernel == 5) {
        correlate_row<A, 5, kVectorBytes == 64 ? 5 : 1>(rows, grad, p.grad.width, p.stride, kL, sums);
      } else {
        for (int64_t i = 0; i < p.kernel; ++i)
          for (int64_t j = 0; j < p.kernel; ++j)
            for (int64_t w = 0; w < p.grad.width; ++w)
              sums[i * p.kernel + j] += load(grad + w * kL) * load(rows[i] + (w * p.stride + j) * kL);
      }
    }
    A* partial = static_cast<A*>(p.partial) + (image * strips + strip) * taps * p.channels + c;
    for (int64_t t = 0; t < taps; ++t) store_n(partial + t * p.channels, sums[t], n);
  });
  if (status == kOk) add_parts<A>(p.partial, p.batch * strips, taps, p.channels, true, p.out, threads);
  return static_cast<Status>(status);
}

}  // namespace

Status affine_gradient(const AffineGradientParams& p, int threads) {
  if (p.dtype == kFloat32) return affine<float>(p, threads);
  if (p.dtype == kFloat64) return affine<double>(p, threads);
  return kBadDtype;
}

Status product_gradient(const ProductGradientParams& p, int threads) {
  if (p.dtype == kFloat32) return product<float>(p, threads);
  if (p.dtype == kFloat64) return product<double>(p, threads);
  return kBadDtype;
}

Status gate_gradient(const GateGradientParams& p, int threads) {
  if (p.dtype == kFloat32) return gate<float>(p, threads);
  if (p.dtype == kFloat64) return gate<double>(p, threads);
  return kBadDtype;
}

Status depthwise_gradient(const DepthwiseGradientParams& p, int threads) {
  if (p.dtype == kFloat32) return depthwise<float>(p, threads);
  if (p.dtype == kFloat64) return depthwise<double>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
