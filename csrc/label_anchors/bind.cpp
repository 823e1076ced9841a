#include "common/bind.h"

#include <algorithm>

#include "label_anchors/params.h"
#include "label_anchors/workspace.h"

namespace effdet {
namespace {

LabelAnchorsParams read(const Fields& f) {
  LabelAnchorsParams p{};
  p.dtype = f.dtype();
  p.batch = f.size("batch", 1);
  p.count = f.size("count", 1);
  p.total = f.size("total", 1);
  p.parts = f.integer("parts", 1, p.total);
  p.boxes = f.elements("boxes");
  p.classes = static_cast<const std::int64_t*>(f.pointer("classes", 8));
  p.anchors = f.elements("anchors");
  p.labels = static_cast<std::int64_t*>(f.pointer("labels", 8));
  p.codes = f.elements("codes");
  p.positives = f.elements("positives");
  p.infinite = static_cast<std::int64_t*>(f.pointer("infinite", 8));
  p.workspace = f.pointer("workspace", 64);
  p.threshold = f.get("threshold").cast<double>();
  return p;
}

// One part of an image for each thread, or a few, where images alone are too few to share evenly.
std::int64_t parts(std::int64_t batch, std::int64_t total, std::int64_t threads) {
  if (threads == 1 || batch == 0) return 1;
  const std::int64_t blocks = (total + kLabelBlock - 1) / kLabelBlock;
  return std::max<std::int64_t>(std::min((2 * threads + batch - 1) / batch, blocks), 1);
}

}  // namespace

void bind_label_anchors(pybind11::module_& module) {
  bind_kernel<LabelAnchorsParams>(module, "label_anchors", read, [] { return EFFDET_FOR_ISA(label_anchors); });
  module.def("label_anchors_parts", &parts);
  module.def("label_anchors_workspace", &label_workspace_bytes);
}

}  // namespace effdet
