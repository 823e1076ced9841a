#include "common/activation_codes.h"
#include "cuda/bind.h"
#include "depthwise_conv/params.h"

namespace effdet::cuda {
namespace {

DepthwiseParams read(const Fields& f) {
  DepthwiseParams p{};
  p.dtype = f.dtype();
  p.x = vector_map(f, "x");
  p.weight = f.elements("weight");
  p.scale = static_cast<const float*>(f.optional("scale", 4));
  p.shift = static_cast<const float*>(f.optional("shift", 4));
  p.y = f.pointer("y", 16);
  p.sums = static_cast<float*>(f.optional("sums", 8));
  p.batch = f.size("batch");
  p.channels = count(f, "channels");
  p.out_height = count(f, "out_height");
  p.out_width = count(f, "out_width");
  p.kernel = static_cast<int>(f.integer("kernel", 3, 5));
  p.stride = static_cast<int>(f.integer("stride", 1, 2));
  p.left = static_cast<int>(f.integer("left", -(1 << 20), 1 << 20));
  p.top = static_cast<int>(f.integer("top", -(1 << 20), 1 << 20));
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.rows = count(f, "rows");
  if (p.dtype == kFloat64) throw std::invalid_argument("dtype: got float64, takes float32, bfloat16 or float16");
  if (p.kernel == 4) throw std::invalid_argument("kernel: got 4, takes 3 or 5");
  if (p.channels % (16 / size_of(p.dtype)) != 0) throw std::invalid_argument("channels: not a multiple of 16 bytes");
  return p;
}

}  // namespace

void bind_cuda_depthwise_conv(pybind11::module_& module) {
  bind_kernel<DepthwiseParams>(module, "depthwise_conv", read, depthwise_conv);
}

}  // namespace effdet::cuda
