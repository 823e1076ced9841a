// Arguments of the CUDA kernels of depthwise_conv, checked by bind_cuda.cpp; the op is documented in
// effdet_kernels/ops/depthwise_conv. On a CPU expand_depthwise has the kernel.
#pragma once

#include <cstdint>

#include "common/map.h"

namespace effdet::cuda {

struct DepthwiseParams {
  Map x;               // [batch, height, width, channels], 16-byte vectors of channels
  const void* weight;  // [channels, kernel, kernel], dense
  const float* scale;  // [channels], or null: 1
  const float* shift;  // [channels], or null: 0
  void* y;             // [batch, out_height, out_width, channels], dense
  float* sums;         // [batch, segments * tiles, channels]: of y over the pixels of a block; null: not wanted
  std::int64_t batch;
  int channels, out_height, out_width, kernel, stride, left, top, act, dtype;
  int rows;  // of the output, that a block makes
};

// Blocks across, and down, an output; a block's channels.
struct DepthwiseCuts {
  int tiles, segments, blocks, channels;
};
DepthwiseCuts depthwise_cuts(const DepthwiseParams& params);

int depthwise_conv(const DepthwiseParams& params, void* stream);

// The gradients of x and weight, given that of the convolution's raw result.
struct DepthwiseGradientParams {
  Map grad;            // [batch, out_height, out_width, channels], 16-byte vectors of channels
  Map x;               // [batch, height, width, channels], the same; read for the gradient of weight only
  const void* weight;  // [channels, kernel, kernel], dense; read for the gradient of x only
  void* dx;            // [batch, height, width, channels], dense; null: not wanted
  float* dweight;      // [groups * segments * tiles, channels, kernel * kernel], to be added up; null: not wanted
  std::int64_t batch;
  int channels, kernel, stride, left, top, dtype;
  int rows;    // of x, that a block walks down; a multiple of the stride
  int groups;  // of images: a block takes every groups-th one
};

DepthwiseCuts depthwise_gradient_cuts(const DepthwiseGradientParams& params);

int depthwise_conv_gradient(const DepthwiseGradientParams& params, void* stream);

}  // namespace effdet::cuda
