#include "common/bind.h"

#include "cpu/activation_codes.h"
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
  p.gates = f.elements("gates");
  return p;
}

}  // namespace

void bind_squeeze_excite(pybind11::module_& module) {
  bind_kernel<SqueezeExciteParams>(module, "squeeze_excite", read, [] { return EFFDET_FOR_ISA(squeeze_excite); });
}

}  // namespace effdet
