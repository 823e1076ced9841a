#include "common/activation_codes.h"
#include "cuda/bind.h"
#include "pointwise_conv/cuda.h"

namespace effdet::cuda {
namespace {

Excite read_excite(const Fields& f, const PointwiseParams& p) {
  Excite e{};
  e.dtype = static_cast<int>(f.integer("weight_dtype", kFloat32, kFloat16));
  if (e.dtype != kFloat32 && e.dtype != p.dtype)
    throw std::invalid_argument("weight_dtype: takes float32 or that of x");
  const std::int64_t bytes = size_of(e.dtype);
  e.parts = static_cast<const float*>(f.pointer("parts", 4));
  e.reduce_weight = f.pointer("reduce_weight", 16);
  e.reduce_bias = f.pointer("reduce_bias", bytes);
  e.expand_weight = f.pointer("expand_weight", 2 * bytes);
  e.expand_bias = f.pointer("expand_bias", bytes);
  e.pixels = static_cast<float>(f.size("pixels", 1));
  e.part_count = count(f, "part_count");
  e.reduced = count(f, "reduced");
  e.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  e.hard = static_cast<int>(f.integer("hard", 0, 1));
  if (p.in_channels + e.reduced > kMostExcited) throw std::invalid_argument("reduced: takes fewer");
  return e;
}

PointwiseParams read(const Fields& f) {
  PointwiseParams p{};
  p.dtype = f.dtype();
  p.gate_dtype = static_cast<int>(f.integer("gate_dtype", kFloat32, kFloat16));
  if (p.dtype == kFloat64) throw std::invalid_argument("dtype: got float64, takes float32, bfloat16 or float16");
  if (p.gate_dtype != kFloat32 && p.gate_dtype != p.dtype)
    throw std::invalid_argument("gate_dtype: takes float32 or that of x");
  p.x = vector_map(f, "x");
  p.weight = f.pointer("weight", 16);
  p.scale = static_cast<const float*>(f.optional("scale", 4));
  p.shift = static_cast<const float*>(f.optional("shift", 4));
  p.gate = f.optional("gate", size_of(p.gate_dtype));
  if (!f.get("residual").is_none()) {
    p.residual = vector_map(f, "residual");
    if (p.residual.height != p.x.height || p.residual.width != p.x.width)
      throw std::invalid_argument("residual: its size is not that of x");
  }
  p.y = f.pointer("y", 16);
  p.batch = f.size("batch");
  p.in_channels = static_cast<int>(f.integer("in_channels", 1, kMostChannels));
  p.out_channels = count(f, "out_channels");
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.multiprocessors = count(f, "multiprocessors");
  const std::int64_t unit = 16 / size_of(p.dtype);
  if (p.in_channels % unit != 0) throw std::invalid_argument("in_channels: not a multiple of 16 bytes");
  if (p.out_channels % unit != 0) throw std::invalid_argument("out_channels: not a multiple of 16 bytes");
  if (!f.get("excite").is_none()) {
    if (p.gate) throw std::invalid_argument("excite: takes no gate beside it");
    p.excite = read_excite(Fields(f.get("excite").cast<pybind11::dict>()), p);
  }
  if (std::int64_t{p.in_channels} * p.out_channels > kMostInside)
    throw std::invalid_argument("weight: more than 2^31 elements");
  return p;
}

}  // namespace

void bind_cuda_pointwise_conv(pybind11::module_& module) {
  bind_kernel<PointwiseParams>(module, "pointwise_conv", read, pointwise_conv);
}

}  // namespace effdet::cuda
