// Arguments of the CUDA kernel of expand_depthwise, checked by bind_cuda.cpp; the op is documented in
// effdet_kernels/ops/expand_depthwise/op.py.
#pragma once

#include "depthwise_conv/params.h"

namespace effdet::cuda {

struct ExpandDepthwiseParams {
  Map x;                      // [batch, height, width, in_channels], 16-byte vectors of channels
  const void* expand_weight;  // [channels, in_channels], dense
  const float* expand_scale;  // [channels]
  const float* expand_shift;  // [channels]
  const void* weight;         // [channels, kernel, kernel], dense
  const float* scale;         // [channels], or null: 1
  const float* shift;         // [channels], or null: 0
  void* y;                    // [batch, out_height, out_width, channels], dense
  float* sums;                // [batch, segments * tiles, channels]: of y over the pixels of a block; null: not wanted
  std::int64_t batch;
  int in_channels, channels, out_height, out_width, kernel, stride, left, top, dtype;
  int act, last_act;  // after the expansion, and of y
  int rows;           // of the output, that a block makes
};

int expand_depthwise(const ExpandDepthwiseParams& params, void* stream);

}  // namespace effdet::cuda
