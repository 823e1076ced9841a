// Arguments of pointwise_conv, checked by bind.cpp; the op is documented in effdet_kernels/ops/pointwise_conv/op.py.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace effdet {

struct PointwiseParams {
  const void* x;         // [batch, pixels, in_channels]
  const void* weights;   // packed (cpu/gemm.h)
  const void* scale;     // [out_channels] of the accumulator's type, padded to whole vectors
  const void* shift;     // likewise
  const void* gate;      // [batch, in_channels] of the accumulator's type, or null
  const void* residual;  // [batch, pixels, out_channels], or null
  void* y;               // [batch, pixels, out_channels], dense
  std::int64_t batch, pixels, in_channels, out_channels;
  std::int64_t x_batch_stride, x_pixel_stride;  // in elements
  std::int64_t residual_batch_stride, residual_pixel_stride;
  int dtype, act;

  template <typename F>
  void pointers(F&& f) {
    f(x), f(weights), f(scale), f(shift), f(gate), f(residual), f(y);
  }
};

EFFDET_PER_ISA(Status, pointwise_conv, (const PointwiseParams&, int threads))

}  // namespace effdet
