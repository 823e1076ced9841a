#include "common/bind.h"

#include "common/activation_codes.h"
#include "separable_conv/params.h"
#include "weighted_fusion/bind.h"

namespace effdet {
namespace {

SeparableOutput read_output(const Fields& f, const Fusion& fusion) {
  SeparableOutput o{};
  o.height = f.size("height", 1);
  o.width = f.size("width", 1);
  o.out_channels = f.size("out_channels", 1);
  o.kernel = f.integer("kernel", 1, kMaxKernel);
  read_maps(f, f.get("x"), fusion, o.x);
  o.dw_weights = f.pointer("dw_weights", 64);
  o.pw_weights = f.pointer("pw_weights", 64);
  o.scale = f.accumulators("scale");
  o.shift = f.accumulators("shift");
  o.y = f.elements("y");
  return o;
}

SeparableParams read(const Fields& f) {
  SeparableParams p{};
  p.dtype = f.dtype();
  p.pre_act = static_cast<int>(f.integer("pre_act", 0, kActivations - 1));
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.batch = f.size("batch");
  p.channels = f.size("channels", 1);
  p.fusion = read_fusion(f);
  const auto outputs = f.get("outputs").cast<pybind11::list>();
  p.count = static_cast<std::int64_t>(outputs.size());
  if (p.count > kMaxOutputs) throw std::invalid_argument("outputs: takes at most 12");
  for (std::int64_t i = 0; i < p.count; ++i) {
    const auto output = outputs[i].cast<pybind11::dict>();
    p.outputs[i] = read_output(Fields(output), p.fusion);
  }
  return p;
}

}  // namespace

void bind_separable_conv(pybind11::module_& module) {
  bind_kernel<SeparableParams>(module, "separable_conv", read, [] { return EFFDET_FOR_ISA(separable_conv); });
  module.def("separable_product_dtype", [](int dtype) { return EFFDET_FOR_ISA(separable_product_dtype)(dtype); });
}

}  // namespace effdet
