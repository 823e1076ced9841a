#include "weighted_fusion/bind.h"

#include "common/activation_codes.h"
#include "weighted_fusion/params.h"

namespace effdet {
namespace {

WeightedFusionParams read(const Fields& f) {
  WeightedFusionParams p{};
  p.dtype = f.dtype();
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.batch = f.size("batch");
  p.channels = f.size("channels", 1);
  p.height = f.size("height", 1);
  p.width = f.size("width", 1);
  p.fusion = read_fusion(f);
  read_maps(f, f.get("x"), p.fusion, p.x);
  p.y = f.elements("y");
  return p;
}

FusionGradientParams read_gradient(const Fields& f) {
  FusionGradientParams p{};
  p.dtype = f.dtype();
  p.batch = f.size("batch");
  p.channels = f.size("channels", 1);
  p.fusion = read_fusion(f);
  read_maps(f, f.get("x"), p.fusion, p.x);
  p.grad = f.map("grad");
  const auto grads = f.get("grad_x").cast<pybind11::list>();
  if (static_cast<std::int64_t>(grads.size()) != p.fusion.count) throw std::invalid_argument("grad_x: takes one a map");
  for (std::int64_t i = 0; i < p.fusion.count; ++i)
    p.grad_x[i] = f.as_pointer("grad_x", grads[i], p.dtype == kFloat64 ? 8 : 4);
  p.grad_weight = f.optional_accumulators("grad_weight");
  if (!p.grad_weight != !p.fusion.weight) throw std::invalid_argument("grad_weight: takes an address with a weight");
  p.partial = f.pointer("partial", 64);
  return p;
}

}  // namespace

Fusion read_fusion(const Fields& f) {
  Fusion fusion{};
  const auto resample = f.get("resample").cast<pybind11::list>();
  fusion.count = static_cast<std::int64_t>(resample.size());
  if (fusion.count < 1 || fusion.count > kMaxFused) throw std::invalid_argument("resample: takes one to three codes");
  for (std::int64_t i = 0; i < fusion.count; ++i) {
    fusion.resample[i] = resample[i].cast<int>();
    if (fusion.resample[i] < kIdentity || fusion.resample[i] > kMaxPool)
      throw std::invalid_argument("resample: no such code");
  }
  fusion.weight = f.optional_accumulators("weight");
  fusion.method = static_cast<int>(f.integer("method", 0, kFusionMethods - 1));
  if (!fusion.weight != (fusion.method == kSum)) throw std::invalid_argument("weight: does not fit the method");
  fusion.pool_left = f.size("pool_left");
  fusion.pool_top = f.size("pool_top");
  return fusion;
}

void read_maps(const Fields& f, const pybind11::handle& value, const Fusion& fusion, Map* maps) {
  const auto list = value.cast<pybind11::list>();
  if (static_cast<std::int64_t>(list.size()) != fusion.count) throw std::invalid_argument("x: takes one map per code");
  for (std::int64_t i = 0; i < fusion.count; ++i) maps[i] = f.as_map("x", list[i]);
}

void bind_weighted_fusion(pybind11::module_& module) {
  bind_kernel<WeightedFusionParams>(module, "weighted_fusion", read, [] { return EFFDET_FOR_ISA(weighted_fusion); });
  bind_kernel<FusionGradientParams>(module, "weighted_fusion_gradient", read_gradient,
                                    [] { return EFFDET_FOR_ISA(weighted_fusion_gradient); });
}

}  // namespace effdet
