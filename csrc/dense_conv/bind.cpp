#include "common/bind.h"

#include "common/activation_codes.h"
#include "dense_conv/params.h"

namespace effdet {
namespace {

DenseConvParams read(const Fields& f) {
  DenseConvParams p{};
  p.dtype = f.dtype();
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.batch = f.size("batch");
  p.in_channels = f.size("in_channels", 1);
  p.height = f.size("height", 1);
  p.width = f.size("width", 1);
  p.out_channels = f.size("out_channels", 1);
  p.out_height = f.size("out_height", 1);
  p.out_width = f.size("out_width", 1);
  p.batch_stride = f.stride("batch_stride");
  p.channel_stride = f.stride("channel_stride");
  p.row_stride = f.stride("row_stride");
  p.pixel_stride = f.stride("pixel_stride");
  p.kernel = f.integer("kernel", 1, kMaxKernel);
  p.stride = f.size("stride", 1);
  p.left = f.stride("left");
  p.top = f.stride("top");
  p.dilation = f.size("dilation", 1);
  p.x = f.elements("x");
  p.weights = f.pointer("weights", 64);
  p.scale = f.accumulators("scale");
  p.shift = f.accumulators("shift");
  p.y = f.elements("y");
  return p;
}

}  // namespace

void bind_dense_conv(pybind11::module_& module) {
  bind_kernel<DenseConvParams>(module, "dense_conv", read, [] { return EFFDET_FOR_ISA(dense_conv); });
}

}  // namespace effdet
