// Arguments of the CUDA kernel of soft_nms, checked by bind_cuda.cpp; the op is documented in
// effdet_kernels/ops/soft_nms/op.py.
#pragma once

#include <cstdint>

#include "soft_nms/params.h"

namespace effdet::cuda {

// Candidates of an image; what is kept of more would not fit the shared memory of every GPU.
constexpr int kMostCandidates = 8192;

struct SoftNmsCudaParams {
  const float* boxes;             // [batch, count, 4] xyxy, 16-byte aligned
  const float* scores;            // [batch, count]
  const std::int64_t* classes;    // [batch, count], or null: class-agnostic
  const std::int64_t* num_valid;  // [batch], or null: all
  std::int64_t* index;            // [batch, max_det]
  float* score;                   // [batch, max_det]
  std::int64_t* found;            // [batch]
  std::int64_t* dropped;          // [batch]
  std::int64_t batch;
  int count, max_det;
  Method method;
  float rate;  // -1 / (sigma ln 2): the gaussian factor is 2^(rate iou^2)
  float iou_threshold, score_threshold;
};

int soft_nms(const SoftNmsCudaParams& params, void* stream);

}  // namespace effdet::cuda
