// Arguments of the CUDA kernels of separable_conv, checked by bind_cuda.cpp; the op is documented in
// effdet_kernels/ops/separable_conv/op.py.
#pragma once

#include <cstdint>

#include "cuda/fused_maps.h"

namespace effdet::cuda {

constexpr int kMostLevels = 8;  // of one launch
constexpr int kMostNets = 2;
constexpr int kMostWarps = 8;     // of a block
constexpr int kGroup = 32;        // channels of the output that a warp makes next to each other
constexpr int kTileWidth = 16;    // output pixels
constexpr int kMostStages = 4;    // of the ring of pointwise weights
constexpr int kSliceVectors = 8;  // of channels, that are copied and convolved at a time: 128 bytes

// A level of the pyramid, by net.
struct SeparableLevel {
  Map x[kMostNets];               // [batch, height, width, channels], 16-byte vectors of channels
  void* y[kMostNets];             // [batch, height, width, out_channels], dense
  const float* scale[kMostNets];  // [out_channels], or null: 1
  const float* shift[kMostNets];  // [out_channels], or null: 0
  int height, width;
  int first, across, tiles;  // the launch: its first block, tiles across it and of an image
};

struct SeparableParams {
  SeparableLevel levels[kMostLevels];
  const void* dw_weight[kMostNets];  // [channels, 3, 3], dense
  const void* pw_weight[kMostNets];  // [out_channels, channels], dense
  int out_channels[kMostNets];
  int turns[kMostNets];  // the launch: stages that pass through the ring
  std::int64_t batch;
  int count, nets, channels, pre_act, act, dtype;
  // How the work is cut, effdet_kernels/ops/separable_conv/cuda.py chooses it: a tile's rows of 16 pixels; warps of a
  // block; groups of output channels that a warp makes at a time; 16-byte vectors of input channels of a stage of
  // the ring of pointwise weights; stages.
  int rows, warps, groups, depth, stages;
};

// What follows from the parameters.
struct SeparableCuts {
  int vectors, pitch;  // 16-byte ones of a pixel in shared memory: that are used, and to the next pixel
  int slices;          // of them, that are copied and convolved at a time
  int pieces;          // of them, a stage of the ring each
  int stage_pitch;     // vectors from an output channel to the next in the ring
  int ring_step;       // output channels of a stage that a block's threads copy at once
  int padded;          // output channels, of the net that has most, to whole groups
};

// A node: one net and one level, whose map is the weighted sum of maps; levels[0].x is not read.
struct FusedSeparableParams {
  SeparableParams rest;
  FusedMaps maps;
};

// The gradients of maps and weights, given those of the raw results; a net's levels share its weights.
struct SeparableGradientLevel {
  Map x[kMostNets], grad[kMostNets];  // [batch, height, width, channels or out_channels], 16-byte vectors of channels
  void* dx[kMostNets];                // [batch, height, width, channels], dense; null: not wanted
  int height, width;
  int first, across, tiles;  // the launch: its first tile of all images, tiles across it and of an image
};

struct SeparableGradientParams {
  SeparableGradientLevel levels[kMostLevels];
  const void* dw_weight[kMostNets];  // [channels, 3, 3], dense
  const void* pw_weight[kMostNets];  // [out_channels, channels], dense
  float* d_dw[kMostNets];            // [workers, channels, 9], to be added up; null: not wanted
  float* d_pw[kMostNets];            // [workers, out_channels, channels], the same
  int out_channels[kMostNets];
  std::int64_t batch;
  int count, nets, channels, dtype;
  int workers;  // blocks of a net: each takes every workers-th tile
};

constexpr int kMostGradientChannels = 128;  // of the maps, and of the results

int separable_conv_gradient(const SeparableGradientParams& params, void* stream);
int separable_conv(const SeparableParams& params, void* stream);
int separable_conv_fused(const FusedSeparableParams& params, void* stream);

// Whether a tile of the dtype may have `rows` rows, and of how many warps a block is a multiple then; 0: it may not.
int separable_warps(int dtype, int rows);

}  // namespace effdet::cuda
