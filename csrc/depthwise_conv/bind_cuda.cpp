#include "common/activation_codes.h"
#include "cuda/bind.h"
#include "depthwise_conv/params.h"

namespace effdet::cuda {
namespace {

int padding(const Fields& f, const char* name) {
  return static_cast<int>(f.integer(name, -(1 << 20), 1 << 20));
}

template <typename Params>
void read_common(const Fields& f, Params& p) {
  p.dtype = f.dtype();
  p.batch = count(f, "batch", 0);
  p.channels = count(f, "channels");
  p.kernel = static_cast<int>(f.integer("kernel", 3, 5));
  p.stride = static_cast<int>(f.integer("stride", 1, 2));
  p.left = padding(f, "left");
  p.top = padding(f, "top");
  p.rows = count(f, "rows");
  if (p.dtype == kFloat64) throw std::invalid_argument("dtype: got float64, takes float32, bfloat16 or float16");
  if (p.kernel == 4) throw std::invalid_argument("kernel: got 4, takes 3 or 5");
  if (p.channels % (16 / size_of(p.dtype)) != 0) throw std::invalid_argument("channels: not a multiple of 16 bytes");
}

DepthwiseParams read(const Fields& f) {
  DepthwiseParams p{};
  read_common(f, p);
  p.x = vector_map(f, "x");
  p.weight = f.elements("weight");
  p.scale = static_cast<const float*>(f.optional("scale", 4));
  p.shift = static_cast<const float*>(f.optional("shift", 4));
  p.y = f.pointer("y", 16);
  p.sums = static_cast<float*>(f.optional("sums", 8));
  p.out_height = count(f, "out_height");
  p.out_width = count(f, "out_width");
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  dense_map(p.channels, p.out_height, p.out_width);
  return p;
}

DepthwiseGradientParams read_gradient(const Fields& f) {
  DepthwiseGradientParams p{};
  read_common(f, p);
  p.grad = vector_map(f, "grad");
  p.x = vector_map(f, "x");
  p.weight = f.elements("weight");
  p.dx = f.optional("dx", 16);
  p.dweight = static_cast<float*>(f.optional("dweight", 4));
  p.groups = count(f, "groups");
  if (p.left < 0 || p.top < 0) throw std::invalid_argument("left, top: got less than 0");
  if (p.rows % p.stride != 0) throw std::invalid_argument("rows: not a multiple of the stride");
  if (p.groups > p.batch) throw std::invalid_argument("groups: more than images");
  dense_map(p.channels, static_cast<int>(p.x.height), static_cast<int>(p.x.width));
  return p;
}

}  // namespace

void bind_cuda_depthwise_conv(pybind11::module_& module) {
  bind_kernel<DepthwiseParams>(module, "depthwise_conv", read, depthwise_conv);
  bind_kernel<DepthwiseGradientParams>(module, "depthwise_conv_gradient", read_gradient, depthwise_conv_gradient);
}

}  // namespace effdet::cuda
