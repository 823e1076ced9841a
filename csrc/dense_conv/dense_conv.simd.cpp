// Dense convolution as a matrix product whose k runs over kernel rows, each contiguous in a padded channels-last row.
// A work item is a strip of output rows of one image; input rows are copied, from any layout, into a ring.
#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/depthwise.h"
#include "cpu/gemm.h"
#include "dense_conv/params.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

// Places [first, end) of row h of the image, zeros between its pixels counted, into `to`.
template <typename T>
EFFDET_INLINE void copy_row(const DenseConvParams& p, int64_t image, int64_t h, int64_t first, int64_t end, T* to) {
  const int64_t d = p.dilation, begin = divide_up(first, d), stop = divide_up(end, d), step = d * p.in_channels;
  const T* x = static_cast<const T*>(p.x) + image * p.batch_stride + h / d * p.row_stride + begin * p.pixel_stride;
  to += (begin * d - first) * p.in_channels;
  if (p.channel_stride == 1) {
    for (int64_t w = 0; w < stop - begin; ++w)
      std::memcpy(to + w * step, x + w * p.pixel_stride, sizeof(T) * p.in_channels);
    return;
  }
  for (int64_t c = 0; c < p.in_channels; ++c) {
    const T* from = x + c * p.channel_stride;
    for (int64_t w = 0; w < stop - begin; ++w) to[w * step + c] = from[w * p.pixel_stride];
  }
}

EFFDET_INLINE int64_t places_of(const DenseConvParams& p) {
  return (p.out_width - 1) * p.stride + p.kernel;
}

template <typename T>
void strip(const DenseConvParams& p, int64_t image, int64_t first_row, int64_t end_row, T* memory) {
  using A = Acc<T>;
  const int64_t in_height = (p.height - 1) * p.dilation + 1, in_width = (p.width - 1) * p.dilation + 1;
  const int64_t places = places_of(p), row_size = places * p.in_channels;
  const int64_t from = most<int64_t>(-p.left, 0), to = least(places - p.left, in_width);
  std::memset(memory, 0, sizeof(T) * (p.kernel + 1) * row_size);
  const T* zeros = memory + p.kernel * row_size;
  const T* segments[kMaxKernel];
  int64_t made = most<int64_t>(0, first_row * p.stride - p.top);
  for (int64_t row = first_row; row < end_row; ++row) {
    const int64_t h = row * p.stride - p.top;
    made = most(made, h);
    for (; made < least(h + p.kernel, in_height); ++made)
      if (made % p.dilation == 0 && to > from)
        copy_row(p, image, made, from, to, memory + made % p.kernel * row_size + (from + p.left) * p.in_channels);
    for (int64_t i = 0; i < p.kernel; ++i) {
      const bool inside = h + i >= 0 && h + i < in_height && (h + i) % p.dilation == 0;
      segments[i] = inside ? memory + (h + i) % p.kernel * row_size : zeros;
    }
    Epilogue<T> out;
    out.scale = static_cast<const A*>(p.scale);
    out.shift = static_cast<const A*>(p.shift);
    out.act = p.act;
    out.channels = p.out_channels;
    out.y = static_cast<T*>(p.y) + (image * p.out_height + row) * p.out_width * p.out_channels;
    out.ldy = p.out_channels;
    out.residual = nullptr;
    out.ldr = 0;
    const int64_t length = p.kernel * p.in_channels;
    multiply<T, T>({segments, p.kernel, length, p.stride * p.in_channels, p.weights}, out, p.out_width);
  }
}

template <typename T>
Status run(const DenseConvParams& p, int threads) {
  const int64_t bytes = static_cast<int64_t>(sizeof(T)) * (p.kernel + 1) * places_of(p) * p.in_channels;
  const int64_t wanted = divide_up(int64_t{8} * threads, most<int64_t>(1, p.batch));
  const int64_t strips = most<int64_t>(1, least(wanted, p.out_height / 4));
  int status = kOk;
  parallel_for(p.batch * strips, threads, [&](int64_t item) {
    T* memory = static_cast<T*>(thread_scratch(bytes));
    if (!memory) {
      __atomic_store_n(&status, kOutOfMemory, __ATOMIC_RELAXED);
      return;
    }
    const TileRegisters<T> registers(p.kernel * p.in_channels);
    const int64_t part = item % strips;
    strip<T>(p, item / strips, p.out_height * part / strips, p.out_height * (part + 1) / strips, memory);
  });
  return static_cast<Status>(status);
}

}  // namespace

Status dense_conv(const DenseConvParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
