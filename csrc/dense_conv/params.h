// Arguments of dense_conv, checked by bind.cpp; the op is documented in effdet_kernels/ops/dense_conv/op.py.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace effdet {

struct DenseConvParams {
  const void* x;        // [batch, in_channels, height, width], any strides
  const void* weights;  // packed (cpu/gemm.h), a segment per kernel row
  const void* scale;    // [out_channels] of the accumulator's type, padded to whole vectors
  const void* shift;
  void* y;  // [batch, out_height, out_width, out_channels], dense
  std::int64_t batch, in_channels, height, width, out_channels, out_height, out_width;
  std::int64_t batch_stride, channel_stride, row_stride, pixel_stride;  // in elements
  std::int64_t kernel, stride, left, top;                               // negative padding leaves out pixels
  std::int64_t dilation;  // 1, or zeros come between the pixels of x, this many apart: how a gradient spreads
  int dtype, act;

  template <typename F>
  void pointers(F&& f) {
    f(x), f(weights), f(scale), f(shift), f(y);
  }
};

EFFDET_PER_ISA(Status, dense_conv, (const DenseConvParams&, int threads))

}  // namespace effdet
