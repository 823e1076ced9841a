// Arguments of the CUDA kernels of weighted_fusion, checked by bind_cuda.cpp; the op is documented in
// effdet_kernels/ops/weighted_fusion.
#pragma once

#include "cuda/fusion.h"

namespace effdet::cuda {

struct WeightedFusionParams {
  FusedMaps maps;
  void* y;  // [batch, height, width, channels], dense
  std::int64_t batch;
  int channels, act, dtype;
  int rows;  // that a thread walks down; of pairs of rows where the second of two maps has half the size
};

int weighted_fusion(const WeightedFusionParams& params, void* stream);

}  // namespace effdet::cuda
