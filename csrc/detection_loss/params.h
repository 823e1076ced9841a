// Arguments of detection_loss (one level of the pyramid) and of its backward, checked by bind.cpp; the op is documented
// in effdet_kernels/ops/detection_loss/op.py, the mathematics in the README beside it.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace effdet {

constexpr std::int64_t kLossBlock = 16;  // pixels of one image whose losses are added up together

inline std::int64_t loss_blocks(std::int64_t batch, std::int64_t pixels) {
  return batch * ((pixels + kLossBlock - 1) / kLossBlock);
}

struct DetectionLossParams {
  const void* logits;          // [batch, pixels, anchors * classes]
  const void* codes;           // [batch, pixels, anchors * 4]
  const std::int64_t* labels;  // [batch, pixels, anchors], dense but for the batch stride
  const void* targets;         // [batch, pixels, anchors * 4] of the accumulator's type, likewise
  double* sums;                // forward: [2], the sums of the focal and of the huber loss
  std::int64_t* range;         // forward: [2], the least and the largest label
  double* partial;             // forward: workspace [loss_blocks, 2]
  const void* factors;         // backward: [2] of the accumulator's type, the gradients of the two sums
  void* grad_logits;           // backward: dense, or null
  void* grad_codes;            // likewise
  std::int64_t batch, pixels, anchors, classes;
  std::int64_t logit_batch_stride, logit_pixel_stride, code_batch_stride, code_pixel_stride;
  std::int64_t label_batch_stride, target_batch_stride;
  double alpha, gamma, delta, smoothing;
  int dtype;

  template <typename F>
  void pointers(F&& f) {
    f(logits), f(codes), f(labels), f(targets), f(sums), f(range), f(partial), f(factors), f(grad_logits),
        f(grad_codes);
  }
};

EFFDET_PER_ISA(Status, detection_loss, (const DetectionLossParams&, int threads))
EFFDET_PER_ISA(Status, detection_loss_backward, (const DetectionLossParams&, int threads))

}  // namespace effdet
