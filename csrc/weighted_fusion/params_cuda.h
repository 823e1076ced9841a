// Arguments of the CUDA kernels of weighted_fusion, checked by bind_cuda.cpp; the op is documented in
// effdet_kernels/ops/weighted_fusion.
#pragma once

#include "cuda/fused_maps.h"

namespace effdet::cuda {

struct WeightedFusionParams {
  FusedMaps maps;
  void* y;  // [batch, height, width, channels], dense
  std::int64_t batch;
  int channels, act, dtype;
  int rows;  // that a thread walks down; of pairs of rows where the second of two maps has half the size
};

int weighted_fusion(const WeightedFusionParams& params, void* stream);

constexpr int kPoolThreads = 256;  // at most, of a block of the gradient under a max-pool

struct FusionGradientParams {
  FusedMaps maps;
  Map grad;             // of the result
  void* dx[kMaxFused];  // [batch, H_i, W_i, channels], dense; null: not wanted
  float* delta;         // workspace [batch, height, width, channels]: the gradient before the activation; may be null
                        // where there is none or no map is gathered
  float* parts;         // workspace [blocks, maps]: sums of delta * r_i(x_i); null: no gradient of the weights
  float* of_weight;     // [maps]; null where parts is
  std::int64_t batch, blocks;
  int channels, act, dtype;
  int rows;              // as above; with a pooled last map, of places: pairs of its rows
  int columns, vectors;  // with a pooled last map: places across, and vectors of channels, of a block
};

// Which kernel looks at the result; what it leaves, kGather does map by map.
enum class GradientKernel { kEach, kHalved, kPooled };
GradientKernel gradient_kernel(const FusionGradientParams& params);

// Blocks of that kernel; negative: too many.
std::int64_t gradient_blocks(const FusionGradientParams& params);

int weighted_fusion_gradient(const FusionGradientParams& params, void* stream);

}  // namespace effdet::cuda
