#include "common/bind.h"

#include "batch_norm_act/params.h"
#include "common/activation_codes.h"

namespace effdet {
namespace {

BatchNormParams read(const Fields& f) {
  BatchNormParams p{};
  p.dtype = f.dtype();
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.batch = f.size("batch", 1);
  p.pixels = f.size("pixels", 1);
  p.channels = f.size("channels", 1);
  p.eps = f.get("eps").cast<double>();
  p.x = f.elements("x");
  p.x_batch_stride = f.stride("x_batch_stride");
  p.x_pixel_stride = f.stride("x_pixel_stride");
  p.weight = f.accumulators("weight");
  p.bias = f.accumulators("bias");
  p.y = f.optional("y", size_of(p.dtype));
  p.mean = f.accumulators("mean");
  p.variance = f.accumulators("variance");
  p.partial = f.pointer("partial", 64);
  p.given = static_cast<int>(f.integer("given", 0, 1));
  return p;
}

BatchNormParams read_forward(const Fields& f) {
  BatchNormParams p = read(f);
  if (!p.y) throw std::invalid_argument("y: got a null address");
  return p;
}

BatchNormParams read_backward(const Fields& f) {
  BatchNormParams p = read(f);
  p.grad = f.elements("grad");
  p.grad_batch_stride = f.stride("grad_batch_stride");
  p.grad_pixel_stride = f.stride("grad_pixel_stride");
  p.grad_weight = f.accumulators("grad_weight");
  p.grad_bias = f.accumulators("grad_bias");
  if (p.given && !p.y) throw std::invalid_argument("y: got a null address");
  return p;
}

}  // namespace

void bind_batch_norm_act(pybind11::module_& module) {
  bind_kernel<BatchNormParams>(module, "batch_norm_act", read_forward, [] { return EFFDET_FOR_ISA(batch_norm_act); });
  bind_kernel<BatchNormParams>(module, "batch_norm_act_backward", read_backward,
                               [] { return EFFDET_FOR_ISA(batch_norm_act_backward); });
  module.def("batch_norm_workspace", &batch_norm_workspace);
}

}  // namespace effdet
