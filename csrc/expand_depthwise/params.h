// Arguments of depthwise_conv and expand_depthwise, checked by bind.cpp; the ops are documented in effdet_kernels/ops.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/map.h"

namespace effdet {

struct ExpandDepthwiseParams {
  Map x;                       // [batch, height, width, in_channels]
  const void* expand_weights;  // packed (cpu/gemm.h); null: no expansion, in_channels == channels
  const void* expand_scale;    // [channels] of the accumulator's type, padded to whole vectors
  const void* expand_shift;
  const void* weights;  // packed: per vector of channels its kernel * kernel vectors
  const void* scale;    // padded, or null together with shift: the raw result
  const void* shift;
  void* y;         // [batch, out_height, out_width, channels], dense
  void* row_sums;  // workspace [batch, out_height, channels] of the accumulator's type; null: no sums
  void* y_sums;    // [batch, channels] of the accumulator's type
  std::int64_t batch, in_channels, channels, out_height, out_width;
  std::int64_t kernel, stride, left, top;  // negative padding leaves out pixels
  std::int64_t dilation;  // 1, or zeros come between the pixels of x, this many apart: how a gradient spreads
  int dtype, expand_act, act;

  template <typename F>
  void pointers(F&& f) {
    f(x.data), f(expand_weights), f(expand_scale), f(expand_shift), f(weights), f(scale), f(shift);
    f(y), f(row_sums), f(y_sums);
  }
};

EFFDET_PER_ISA(Status, expand_depthwise, (const ExpandDepthwiseParams&, int threads))

}  // namespace effdet
