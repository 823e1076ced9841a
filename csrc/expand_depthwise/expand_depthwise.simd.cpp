// [1x1 expansion, affine, activation,] depthwise convolution, affine, activation and sums, in row strips.
//
// A work item takes a panel of channels (up to 3 vectors) and a strip of output rows. Input rows are made, by the
// expansion or by copying, into a ring of as many rows as the kernel has, with the zeros of the padding around them, so
// that the convolution has no borders. The ring is narrow enough for the first-level cache: wide maps go in columns.
#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/depthwise.h"
#include "cpu/gemm.h"
#include "expand_depthwise/params.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

constexpr int64_t kRingBytes = 32 * 1024;

template <typename T>
struct Slice {
  const ExpandDepthwiseParams& p;
  int64_t image, panel_start, panel_width;  // in vectors
  int64_t channel, channels;

  // Places [first, first + count) of input row h into `to`, from pixel to pixel panel_width vectors.
  EFFDET_INLINE void make(int64_t h, int64_t first, int64_t count, Acc<T>* to) const {
    using A = Acc<T>;
    const T* x =
        static_cast<const T*>(p.x.data) + image * p.x.batch_stride + h * p.x.row_stride + first * p.x.pixel_stride;
    const int64_t width = panel_width * kLanes<T>;
    if (p.expand_weights) {
      const int64_t k = packed_length<T>(p.in_channels);
      const void* weights = static_cast<const char*>(p.expand_weights) + panel_start * k * kPackedBytes<T>;
      Epilogue<A> out;
      out.scale = static_cast<const A*>(p.expand_scale) + channel;
      out.shift = static_cast<const A*>(p.expand_shift) + channel;
      out.act = p.expand_act;
      out.channels = width;
      out.y = to;
      out.ldy = width;
      out.residual = nullptr;
      out.ldr = 0;
      multiply_panel<T, A>({&x, 1, p.in_channels, p.x.pixel_stride, weights}, out, count, panel_width);
      return;
    }
    // With a dilation d every d-th place holds a pixel; the places between them stay zero.
    const int64_t d = p.dilation, begin = divide_up(first, d), end = divide_up(first + count, d);
    x = static_cast<const T*>(p.x.data) + image * p.x.batch_stride + h / d * p.x.row_stride + channel;
    for (int64_t pixel = begin; pixel < end; ++pixel)
      for (int64_t c = 0; c < width; c += kLanes<T>)
        store(to + (pixel * d - first) * width + c, load_n(x + pixel * p.x.pixel_stride + c, channels - c));
  }
};

template <typename T>
void strip(const Slice<T>& slice, int64_t first_row, int64_t end_row, int64_t columns, Acc<T>* memory) {
  using A = Acc<T>;
  const ExpandDepthwiseParams& p = slice.p;
  const int64_t width = slice.panel_width * kLanes<T>;
  const int64_t in_height = (p.x.height - 1) * p.dilation + 1, in_width = (p.x.width - 1) * p.dilation + 1;
  const A* rows[kMaxKernel];
  for (int64_t column = 0; column < p.out_width; column += columns) {
    const int64_t count = least(columns, p.out_width - column);
    // Input places under these outputs, and those of them that are inside the map.
    const int64_t begin = column * p.stride - p.left, places = (count - 1) * p.stride + p.kernel;
    const int64_t from = most<int64_t>(begin, 0), to = least(begin + places, in_width);
    const Ring<A> ring(memory, p.kernel, places, width);
    ring.clear();
    int64_t made = most<int64_t>(0, first_row * p.stride - p.top);
    for (int64_t row = first_row; row < end_row; ++row) {
      const int64_t h = row * p.stride - p.top;
      made = most(made, h);
      for (; made < least(h + p.kernel, in_height); ++made)
        if (to > from && made % p.dilation == 0)
          slice.make(made, from, to - from, ring.row(made) + (from - begin) * width);
      for (int64_t i = 0; i < p.kernel; ++i)
        rows[i] = h + i >= 0 && h + i < in_height && (h + i) % p.dilation == 0 ? ring.row(h + i) : ring.zeros;
      RowEpilogue<T> out;
      out.scale = p.scale ? static_cast<const A*>(p.scale) + slice.channel : nullptr;
      out.shift = p.scale ? static_cast<const A*>(p.shift) + slice.channel : nullptr;
      out.act = p.act;
      const int64_t place = slice.image * p.out_height + row;
      out.y = static_cast<T*>(p.y) + (place * p.out_width + column) * p.channels + slice.channel;
      out.ldy = p.channels;
      out.channels = slice.channels;
      out.sums = p.row_sums ? static_cast<A*>(p.row_sums) + place * p.channels + slice.channel : nullptr;
      if (out.sums && column == 0) std::memset(out.sums, 0, sizeof(A) * slice.channels);
      const A* weights = static_cast<const A*>(p.weights) + slice.channel * p.kernel * p.kernel;
      convolve_row<T>(rows, p.kernel, p.stride, width, count, weights, out);
    }
  }
}

template <typename A>
void add_rows(const ExpandDepthwiseParams& p, int64_t image) {
  const A* rows = static_cast<const A*>(p.row_sums) + image * p.out_height * p.channels;
  A* sums = static_cast<A*>(p.y_sums) + image * p.channels;
  std::memset(sums, 0, sizeof(A) * p.channels);
  for (int64_t row = 0; row < p.out_height; ++row)
    for (int64_t c = 0; c < p.channels; ++c) sums[c] += rows[row * p.channels + c];
}

template <typename T>
Status run(const ExpandDepthwiseParams& p, int threads) {
  using A = Acc<T>;
  const Panels panels(vectors_of<T>(p.channels));
  const int64_t widest = least<int64_t>(kPanel, panels.vectors) * kLanes<T>;
  const int64_t fitting = kRingBytes / (p.kernel * widest * static_cast<int64_t>(sizeof(A)) * p.stride);
  const int64_t columns = least(p.out_width, most<int64_t>(fitting / 8 * 8, 16));
  const int64_t places = (columns - 1) * p.stride + p.kernel;
  const int64_t bytes = Ring<A>::size(p.kernel, places, widest) * static_cast<int64_t>(sizeof(A));
  // Strips of at least 8 rows. Where two strips meet, an expansion computes kernel - stride input rows twice: as many
  // strips as make that, shared by the threads, and half a strip, for which a thread waits at the end, the least.
  const int64_t items = most<int64_t>(1, p.batch * panels.count);
  int64_t wanted = divide_up(int64_t{8} * threads, items);
  const int64_t twice = p.expand_weights ? most<int64_t>(0, p.kernel - p.stride) : 0;
  while (wanted > 1 && 2 * items * twice * wanted * (wanted - 1) > p.out_height * p.stride * threads) --wanted;
  const int64_t strips = most<int64_t>(1, least(wanted, p.out_height / 8));
  int status = kOk;
  parallel_for(p.batch * panels.count * strips, threads, [&](int64_t item) {
    A* memory = static_cast<A*>(thread_scratch(bytes));
    if (!memory) {
      __atomic_store_n(&status, kOutOfMemory, __ATOMIC_RELAXED);
      return;
    }
    const TileRegisters<T> registers(p.in_channels);
    const int64_t part = item % strips, panel = item / strips % panels.count, image = item / strips / panels.count;
    const int64_t channel = panels.start(panel) * kLanes<T>;
    const int64_t channels = least(p.channels - channel, panels.width(panel) * kLanes<T>);
    const Slice<T> slice{p, image, panels.start(panel), panels.width(panel), channel, channels};
    strip<T>(slice, p.out_height * part / strips, p.out_height * (part + 1) / strips, columns, memory);
  });
  if (p.row_sums && status == kOk) parallel_for(p.batch, threads, [&](int64_t image) { add_rows<A>(p, image); });
  return static_cast<Status>(status);
}

}  // namespace

Status expand_depthwise(const ExpandDepthwiseParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
