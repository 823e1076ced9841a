#include "common/bind.h"

#include "detection_loss/params.h"

namespace effdet {
namespace {

DetectionLossParams read(const Fields& f) {
  DetectionLossParams p{};
  p.dtype = f.dtype();
  p.batch = f.size("batch", 1);
  p.pixels = f.size("pixels", 1);
  p.anchors = f.size("anchors", 1);
  p.classes = f.size("classes", 1);
  p.logits = f.elements("logits");
  p.logit_batch_stride = f.stride("logit_batch_stride");
  p.logit_pixel_stride = f.stride("logit_pixel_stride");
  p.codes = f.elements("codes");
  p.code_batch_stride = f.stride("code_batch_stride");
  p.code_pixel_stride = f.stride("code_pixel_stride");
  p.labels = static_cast<std::int64_t*>(f.pointer("labels", 8));
  p.label_batch_stride = f.stride("label_batch_stride");
  p.targets = f.accumulators("targets");
  p.target_batch_stride = f.stride("target_batch_stride");
  p.alpha = f.get("alpha").cast<double>();
  p.gamma = f.get("gamma").cast<double>();
  p.delta = f.get("delta").cast<double>();
  p.smoothing = f.get("smoothing").cast<double>();
  return p;
}

DetectionLossParams read_forward(const Fields& f) {
  DetectionLossParams p = read(f);
  p.sums = static_cast<double*>(f.pointer("sums", 8));
  p.range = static_cast<std::int64_t*>(f.pointer("range", 8));
  p.partial = static_cast<double*>(f.pointer("partial", 8));
  return p;
}

DetectionLossParams read_backward(const Fields& f) {
  DetectionLossParams p = read(f);
  p.factors = f.accumulators("factors");
  p.grad_logits = f.optional("grad_logits", size_of(p.dtype));
  p.grad_codes = f.optional("grad_codes", size_of(p.dtype));
  return p;
}

}  // namespace

void bind_detection_loss(pybind11::module_& module) {
  bind_kernel<DetectionLossParams>(module, "detection_loss", read_forward,
                                   [] { return EFFDET_FOR_ISA(detection_loss); });
  bind_kernel<DetectionLossParams>(module, "detection_loss_backward", read_backward,
                                   [] { return EFFDET_FOR_ISA(detection_loss_backward); });
  module.def("loss_blocks", &loss_blocks);
}

}  // namespace effdet
