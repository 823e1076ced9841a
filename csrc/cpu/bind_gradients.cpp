#include "common/activation_codes.h"
#include "common/bind.h"
#include "cpu/gradients.h"

namespace effdet {
namespace {

AffineGradientParams read_affine(const Fields& f) {
  AffineGradientParams p{};
  p.dtype = f.dtype();
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.batch = f.size("batch");
  p.pixels = f.size("pixels", 1);
  p.channels = f.size("channels", 1);
  p.grad = f.elements("grad");
  p.grad_batch_stride = f.stride("grad_batch_stride");
  p.grad_pixel_stride = f.stride("grad_pixel_stride");
  p.z = f.optional("z", size_of(p.dtype));
  if (!p.z && p.act != kNone) throw std::invalid_argument("z: None, with an activation");
  p.z_batch_stride = f.stride("z_batch_stride");
  p.z_pixel_stride = f.stride("z_pixel_stride");
  p.scale = f.accumulators("scale");
  p.shift = f.accumulators("shift");
  p.delta = f.optional("delta", size_of(p.dtype));
  p.grad_scale = f.optional_accumulators("grad_scale");
  p.grad_shift = f.optional_accumulators("grad_shift");
  p.partial = f.pointer("partial", 64);
  return p;
}

ProductGradientParams read_product(const Fields& f) {
  ProductGradientParams p{};
  p.dtype = f.dtype();
  p.batch = f.size("batch");
  p.rows = f.size("rows", 1);
  p.columns = f.size("columns", 1);
  p.a = f.map("a");
  p.b = f.map("b");
  if (p.a.height != p.b.height || p.a.width != p.b.width) throw std::invalid_argument("b: its size is not that of a");
  p.gate = f.optional_accumulators("gate");
  p.transposed = static_cast<int>(f.integer("transposed", 0, 1));
  p.out = f.accumulators("out");
  p.partial = f.pointer("partial", 64);
  return p;
}

GateGradientParams read_gate(const Fields& f) {
  GateGradientParams p{};
  p.dtype = f.dtype();
  p.batch = f.size("batch");
  p.pixels = f.size("pixels", 1);
  p.channels = f.size("channels", 1);
  p.grad = f.elements("grad");
  p.x = f.elements("x");
  p.x_batch_stride = f.stride("x_batch_stride");
  p.x_pixel_stride = f.stride("x_pixel_stride");
  p.gate = f.accumulators("gate");
  p.grad_gate = f.accumulators("grad_gate");
  p.partial = f.pointer("partial", 64);
  return p;
}

DepthwiseGradientParams read_depthwise(const Fields& f) {
  DepthwiseGradientParams p{};
  p.dtype = f.dtype();
  p.batch = f.size("batch");
  p.channels = f.size("channels", 1);
  p.kernel = f.integer("kernel", 1, kMaxKernel);
  p.stride = f.size("stride", 1);
  p.left = f.size("left");
  p.top = f.size("top");
  p.x = f.map("x");
  p.grad = f.map("grad");
  p.out = f.accumulators("out");
  p.partial = f.pointer("partial", 64);
  return p;
}

}  // namespace

void bind_gradients(pybind11::module_& module) {
  bind_kernel<AffineGradientParams>(module, "affine_gradient", read_affine,
                                    [] { return EFFDET_FOR_ISA(affine_gradient); });
  bind_kernel<ProductGradientParams>(module, "product_gradient", read_product,
                                     [] { return EFFDET_FOR_ISA(product_gradient); });
  bind_kernel<GateGradientParams>(module, "gate_gradient", read_gate, [] { return EFFDET_FOR_ISA(gate_gradient); });
  bind_kernel<DepthwiseGradientParams>(module, "depthwise_gradient", read_depthwise,
                                       [] { return EFFDET_FOR_ISA(depthwise_gradient); });
  module.def("gradient_blocks", &gradient_blocks);
  module.def("product_segments", &product_segments);
  module.attr("STRIP_ROWS") = kStripRows;
}

}  // namespace effdet
