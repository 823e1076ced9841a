#include "common/bind.h"

#include "common/activation_codes.h"
#include "pointwise_conv/params.h"

namespace effdet {
namespace {

PointwiseParams read(const Fields& f) {
  PointwiseParams p{};
  p.dtype = f.dtype();
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.batch = f.size("batch");
  p.pixels = f.size("pixels");
  p.in_channels = f.size("in_channels", 1);
  p.out_channels = f.size("out_channels", 1);
  p.x = f.elements("x");
  p.x_batch_stride = f.stride("x_batch_stride");
  p.x_pixel_stride = f.stride("x_pixel_stride");
  p.weights = f.pointer("weights", 64);
  p.scale = f.accumulators("scale");
  p.shift = f.accumulators("shift");
  p.gate = f.optional_accumulators("gate");
  p.residual = f.optional("residual", size_of(p.dtype));
  p.residual_batch_stride = f.stride("residual_batch_stride");
  p.residual_pixel_stride = f.stride("residual_pixel_stride");
  p.y = f.elements("y");
  return p;
}

}  // namespace

void bind_pointwise_conv(pybind11::module_& module) {
  bind_kernel<PointwiseParams>(module, "pointwise_conv", read, [] { return EFFDET_FOR_ISA(pointwise_conv); });
}

}  // namespace effdet
