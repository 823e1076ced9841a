#include "common/bind.h"

#include "common/activation_codes.h"
#include "squeeze_excite/params.h"

namespace effdet {
namespace {

SqueezeExciteParams read(const Fields& f) {
  SqueezeExciteParams p{};
  p.dtype = f.dtype();
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.hard = static_cast<int>(f.integer("hard", 0, 1));
  p.batch = f.size("batch");
  p.channels = f.size("channels", 1);
  p.reduced = f.size("reduced", 1);
  p.count = f.size("count", 1);
  p.sums = f.elements("sums");
  p.reduce_weight = f.elements("reduce_weight");
  p.reduce_bias = f.elements("reduce_bias");
  p.expand_weight = f.elements("expand_weight");
  p.expand_bias = f.elements("expand_bias");
  return p;
}

SqueezeExciteParams read_forward(const Fields& f) {
  SqueezeExciteParams p = read(f);
  p.gates = f.elements("gates");
  return p;
}

SqueezeExciteParams read_backward(const Fields& f) {
  SqueezeExciteParams p = read(f);
  p.grad = f.elements("grad");
  p.grad_sums = f.elements("grad_sums");
  p.grad_reduce_weight = f.elements("grad_reduce_weight");
  p.grad_reduce_bias = f.elements("grad_reduce_bias");
  p.grad_expand_weight = f.elements("grad_expand_weight");
  p.grad_expand_bias = f.elements("grad_expand_bias");
  p.partial = f.elements("partial");
  return p;
}

}  // namespace

void bind_squeeze_excite(pybind11::module_& module) {
  bind_kernel<SqueezeExciteParams>(module, "squeeze_excite", read_forward,
                                   [] { return EFFDET_FOR_ISA(squeeze_excite); });
  bind_kernel<SqueezeExciteParams>(module, "squeeze_excite_backward", read_backward,
                                   [] { return EFFDET_FOR_ISA(squeeze_excite_backward); });
}

}  // namespace effdet
