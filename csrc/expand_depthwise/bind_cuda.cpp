#include "common/activation_codes.h"
#include "cuda/bind.h"
#include "expand_depthwise/cuda.h"

namespace effdet::cuda {
namespace {

ExpandDepthwiseParams read(const Fields& f) {
  ExpandDepthwiseParams p{};
  p.dtype = f.dtype();
  if (p.dtype != kBFloat16 && p.dtype != kFloat16) throw std::invalid_argument("dtype: takes bfloat16 or float16");
  p.x = vector_map(f, "x");
  p.expand_weight = f.pointer("expand_weight", 16);
  p.expand_scale = static_cast<const float*>(f.pointer("expand_scale", 4));
  p.expand_shift = static_cast<const float*>(f.pointer("expand_shift", 4));
  p.weight = f.elements("weight");
  p.scale = static_cast<const float*>(f.optional("scale", 4));
  p.shift = static_cast<const float*>(f.optional("shift", 4));
  p.y = f.pointer("y", 16);
  p.sums = static_cast<float*>(f.optional("sums", 8));
  p.batch = f.size("batch");
  p.in_channels = static_cast<int>(f.integer("in_channels", 1, 4096));
  p.channels = count(f, "channels");
  p.out_height = count(f, "out_height");
  p.out_width = count(f, "out_width");
  p.kernel = static_cast<int>(f.integer("kernel", 3, 5));
  p.stride = static_cast<int>(f.integer("stride", 1, 2));
  p.left = static_cast<int>(f.integer("left", -(1 << 20), 1 << 20));
  p.top = static_cast<int>(f.integer("top", -(1 << 20), 1 << 20));
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.last_act = static_cast<int>(f.integer("last_act", 0, kActivations - 1));
  p.rows = count(f, "rows");
  if (p.kernel == 4) throw std::invalid_argument("kernel: got 4, takes 3 or 5");
  if (p.in_channels % 8 != 0) throw std::invalid_argument("in_channels: not a multiple of 16 bytes");
  if (p.channels % 8 != 0) throw std::invalid_argument("channels: not a multiple of 16 bytes");
  if (std::int64_t{p.in_channels} * p.channels > kMostInside)
    throw std::invalid_argument("expand_weight: more than 2^31 elements");
  dense_map(p.channels, p.out_height, p.out_width);
  return p;
}

}  // namespace

void bind_cuda_expand_depthwise(pybind11::module_& module) {
  bind_kernel<ExpandDepthwiseParams>(module, "expand_depthwise", read, expand_depthwise);
}

}  // namespace effdet::cuda
