// Arguments of the CUDA kernels of pointwise_conv, checked by bind_cuda.cpp; the op is documented in
// effdet_kernels/ops/pointwise_conv/op.py.
#pragma once

#include <cstdint>

#include "common/map.h"

namespace effdet::cuda {

constexpr int kMostChannels = 4032;  // of x: their gates lie in shared memory, of which there may be 99 KB
constexpr int kMostExcited = 4160;   // of x and of what they are reduced to

// Squeeze-excite, as the op of that name has it, of sums in parts.
struct Excite {
  const float* parts;         // [batch, part_count, in_channels], or null: no squeeze-excite
  const void* reduce_weight;  // [reduced, in_channels] of dtype, as the three that follow
  const void* reduce_bias;    // [reduced]
  const void* expand_weight;  // [in_channels, reduced]
  const void* expand_bias;    // [in_channels]
  float pixels;               // of a map that was summed
  int part_count, reduced, act, hard;
  int dtype;  // float32, or that of x
};

struct PointwiseParams {
  Map x;               // [batch, height, width, in_channels], 16-byte vectors of channels
  const void* weight;  // [out_channels, in_channels], dense
  const float* scale;  // [out_channels], or null: 1
  const float* shift;  // [out_channels], or null: 0
  const void* gate;    // [batch, in_channels] of gate_dtype, or null: 1
  Excite excite;       // where its parts are not null, gate is
  Map residual;        // [batch, height, width, out_channels], or with null data: 0
  void* y;             // [batch, height, width, out_channels], dense
  std::int64_t batch;
  int in_channels, out_channels, act, dtype;
  int gate_dtype;       // float32, or dtype
  int multiprocessors;  // where there are fewer large blocks than these, blocks are small
};

int pointwise_conv(const PointwiseParams& params, void* stream);

}  // namespace effdet::cuda
