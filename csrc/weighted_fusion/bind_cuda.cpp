#include "common/activation_codes.h"
#include "cuda/bind_fusion.h"
#include "weighted_fusion/params_cuda.h"

namespace effdet::cuda {
namespace {

// What forward and backward have in common.
template <typename Params>
Params read_common(const Fields& f) {
  Params p{};
  p.dtype = f.dtype();
  p.maps = read_fused_maps(f);
  p.batch = f.size("batch");
  p.channels = count(f, "channels");
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.rows = count(f, "rows");
  if (p.dtype == kFloat64) throw std::invalid_argument("dtype: got float64, takes float32, bfloat16 or float16");
  if (p.channels % (16 / size_of(p.dtype)) != 0) throw std::invalid_argument("channels: not a multiple of 16 bytes");
  return p;
}

WeightedFusionParams read(const Fields& f) {
  auto p = read_common<WeightedFusionParams>(f);
  p.y = f.pointer("y", 16);
  return p;
}

}  // namespace

void bind_cuda_weighted_fusion(pybind11::module_& module) {
  bind_kernel<WeightedFusionParams>(module, "weighted_fusion", read, weighted_fusion);
}

}  // namespace effdet::cuda
