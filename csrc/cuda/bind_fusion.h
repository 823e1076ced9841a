// Reads FusedMaps, for every op that fuses: x, resample, size, pool_left, pool_top, method, weight, weight_dtype.
#pragma once

#include "cuda/bind.h"
#include "cuda/fused_maps.h"

namespace effdet::cuda {

constexpr std::int64_t kMostExtent = std::int64_t{1} << 30;

inline FusedMaps read_fused_maps(const Fields& f) {
  FusedMaps maps{};
  const auto x = f.get("x").cast<pybind11::list>();
  const auto resample = f.get("resample").cast<pybind11::list>();
  maps.count = static_cast<int>(x.size());
  if (maps.count < 1 || maps.count > kMaxFused) throw std::invalid_argument("x: takes one to three maps");
  if (resample.size() != x.size()) throw std::invalid_argument("resample: takes one code per map");
  maps.height = count(f, "height");
  maps.width = count(f, "width");
  maps.pool_left = static_cast<int>(f.integer("pool_left", 0, 2));
  maps.pool_top = static_cast<int>(f.integer("pool_top", 0, 2));
  maps.method = static_cast<int>(f.integer("method", 0, kFusionMethods - 1));
  if (maps.method != kSum) {
    maps.weight_dtype = static_cast<int>(f.integer("weight_dtype", kFloat32, kFloat16));
    maps.weight = f.pointer("weight", size_of(maps.weight_dtype));
  }
  for (int i = 0; i < maps.count; ++i) {
    const Map map = maps.x[i] = as_vector_map(f, "x", x[i]);
    if (map.height > kMostExtent || map.width > kMostExtent)
      throw std::invalid_argument("x: an extent is out of range");
    int& code = maps.resample[i] = resample[i].cast<int>();
    const bool same = map.height == maps.height && map.width == maps.width;
    switch (code) {
      case kIdentity:
        if (!same) throw std::invalid_argument("x: a map that is read as it is has another size than the result");
        break;
      case kNearest:
        if (same) code = kIdentity;
        if (2 * map.height == maps.height && 2 * map.width == maps.width) code = kHalved;
        break;
      case kBilinear:
        if (map.height * maps.height > kMostExtent || map.width * maps.width > kMostExtent)
          throw std::invalid_argument("x: a map to interpolate is too large");
        break;
      case kMaxPool:
        // A window has a pixel of the map at least.
        if (2 * (maps.height - 1) - maps.pool_top >= map.height || 2 * (maps.width - 1) - maps.pool_left >= map.width)
          throw std::invalid_argument("x: a map to pool is smaller than the windows of the result");
        break;
      default:
        throw std::invalid_argument("resample: no such code");
    }
  }
  return maps;
}

}  // namespace effdet::cuda
