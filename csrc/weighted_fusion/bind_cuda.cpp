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

FusionGradientParams read_gradient(const Fields& f) {
  auto p = read_common<FusionGradientParams>(f);
  p.grad = vector_map(f, "grad");
  if (p.grad.height != p.maps.height || p.grad.width != p.maps.width)
    throw std::invalid_argument("grad: has another size than the result");
  const auto dx = f.get("dx").cast<pybind11::list>();
  if (static_cast<int>(dx.size()) != p.maps.count) throw std::invalid_argument("dx: takes one per map");
  bool gathers = false;
  for (int i = 0; i < p.maps.count; ++i) {
    p.dx[i] = Fields::as_pointer("dx", dx[i], 16);
    gathers = gathers || (p.dx[i] && p.maps.resample[i] != kIdentity);
  }
  p.delta = static_cast<float*>(f.optional("delta", 16));
  p.parts = static_cast<float*>(f.optional("parts", 4));
  p.of_weight = static_cast<float*>(f.optional("of_weight", 4));
  if (!p.parts != !p.of_weight || (p.parts && !p.maps.weight))
    throw std::invalid_argument("parts: takes both it and of_weight, and a weight, or none of them");
  p.blocks = f.size("blocks");
  p.columns = static_cast<int>(f.integer("columns", 1, kPoolThreads));
  p.vectors = static_cast<int>(f.integer("vectors", 1, kPoolThreads));
  if (p.columns * p.vectors > kPoolThreads) throw std::invalid_argument("columns: a block has too many threads");
  const GradientKernel kernel = gradient_kernel(p);
  if (kernel == GradientKernel::kPooled && p.columns == 1 && p.maps.x[p.maps.count - 1].width + p.maps.pool_left > 2)
    throw std::invalid_argument("columns: got 1, takes 2 where there is more than one place across");
  if (kernel == GradientKernel::kEach && gathers && p.act != kNone && !p.delta)
    throw std::invalid_argument("delta: got None, with an activation and a map to gather");
  if (p.parts && p.blocks != gradient_blocks(p))
    throw std::invalid_argument("blocks: another number than the kernel's");
  return p;
}

}  // namespace

void bind_cuda_weighted_fusion(pybind11::module_& module) {
  bind_kernel<WeightedFusionParams>(module, "weighted_fusion", read, weighted_fusion);
  bind_kernel<FusionGradientParams>(module, "weighted_fusion_gradient", read_gradient, weighted_fusion_gradient);
}

}  // namespace effdet::cuda
