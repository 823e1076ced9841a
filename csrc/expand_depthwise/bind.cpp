#include "common/bind.h"

#include "common/activation_codes.h"
#include "expand_depthwise/params.h"

namespace effdet {
namespace {

ExpandDepthwiseParams read(const Fields& f) {
  ExpandDepthwiseParams p{};
  p.dtype = f.dtype();
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.expand_act = static_cast<int>(f.integer("expand_act", 0, kActivations - 1));
  p.batch = f.size("batch");
  p.in_channels = f.size("in_channels", 1);
  p.channels = f.size("channels", 1);
  p.out_height = f.size("out_height", 1);
  p.out_width = f.size("out_width", 1);
  p.kernel = f.integer("kernel", 1, kMaxKernel);
  p.stride = f.size("stride", 1);
  p.left = f.stride("left");
  p.top = f.stride("top");
  p.dilation = f.size("dilation", 1);
  p.x = f.map("x");
  p.expand_weights = f.optional("expand_weights", 64);
  if (p.expand_weights) {
    p.expand_scale = f.accumulators("expand_scale");
    p.expand_shift = f.accumulators("expand_shift");
  }
  if (p.expand_weights && p.dilation != 1) throw std::invalid_argument("dilation: takes 1 with an expansion");
  if (!p.expand_weights && p.in_channels != p.channels)
    throw std::invalid_argument("in_channels: differs from channels, without an expansion");
  p.weights = f.pointer("weights", 64);
  p.scale = f.optional_accumulators("scale");
  p.shift = p.scale ? f.accumulators("shift") : nullptr;
  p.y = f.elements("y");
  p.row_sums = f.optional_accumulators("row_sums");
  p.y_sums = p.row_sums ? f.accumulators("y_sums") : nullptr;
  return p;
}

}  // namespace

void bind_expand_depthwise(pybind11::module_& module) {
  bind_kernel<ExpandDepthwiseParams>(module, "expand_depthwise", read, [] { return EFFDET_FOR_ISA(expand_depthwise); });
}

}  // namespace effdet
