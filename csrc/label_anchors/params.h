// Arguments of label_anchors, checked by bind.cpp; the op is documented in effdet_kernels/ops/label_anchors/op.py, the
// way it is computed in the README beside it.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace effdet {

struct LabelAnchorsParams {
  const void* boxes;            // [batch, count, 4] xyxy
  const std::int64_t* classes;  // [batch, count], 1-based; below 0: padding
  const void* anchors;          // [total, 4] xyxy
  std::int64_t* labels;         // [batch, total]
  void* codes;                  // [batch, total, 4]
  void* positives;              // [batch]
  std::int64_t* infinite;       // [1], set where a box that is no padding has a NaN or an infinity: no targets then
  void* workspace;              // label_anchors_workspace bytes
  std::int64_t batch, count, total;
  std::int64_t parts;  // that the anchors of an image are matched in, each by one thread
  double threshold;
  int dtype;

  template <typename F>
  void pointers(F&& f) {
    f(boxes), f(classes), f(anchors), f(labels), f(codes), f(positives), f(infinite), f(workspace);
  }
};

EFFDET_PER_ISA(Status, label_anchors, (const LabelAnchorsParams&, int threads))

}  // namespace effdet
