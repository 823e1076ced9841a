// Arguments of soft_nms, checked by bind.cpp; the op is documented in effdet_kernels/ops/soft_nms/op.py.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace effdet {

enum class Method : int { kGaussian = 0, kLinear = 1, kHard = 2 };

template <typename T>
struct SoftNmsParams {
  const T* boxes;                 // [batch, count, 4] xyxy
  const T* scores;                // [batch, count]
  const std::int64_t* classes;    // [batch, count], or null: class-agnostic
  const std::int64_t* num_valid;  // [batch], or null: all
  std::int64_t* index;            // [batch, max_det]
  T* score;                       // [batch, max_det]
  std::int64_t* found;            // [batch]
  std::int64_t* dropped;          // [batch]
  std::int64_t batch, count, max_det;
  std::int64_t max_per_class;  // 0: no limit
  Method method;
  T sigma, iou_threshold, score_threshold;
};

template <typename T>
Status soft_nms_cpu(const SoftNmsParams<T>& params, int threads);

}  // namespace effdet
