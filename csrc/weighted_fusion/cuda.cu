// weighted_fusion, forward: a thread makes a vector of channels of one column, walking down. The nodes of a BiFPN have
// kernels of their own, in which a pixel that several results look at is read once; another takes every other call.
#include "cuda/activation.h"
#include "weighted_fusion/params_cuda.h"
#include "weighted_fusion/places.h"

namespace effdet::cuda {
namespace {

template <typename T>
__device__ __forceinline__ T* result(const WeightedFusionParams& p, const Place& place, int row, int column) {
  const std::int64_t pixel = (place.image * p.maps.height + row) * p.maps.width + column;
  return static_cast<T*>(p.y) + pixel * p.channels + place.channel;
}

template <typename T>
__device__ __forceinline__ void finish(T* y, float (&sum)[kVector<T>], int act) {
  activate(sum, act);
  store(y, narrow_vector<T>(sum));
}

// Any maps.
template <typename T>
__global__ void __launch_bounds__(kThreads, 5)
    weighted_fusion_fwd_kernel(const WeightedFusionParams p, const Places places) {
  const Place place = places.of_thread<T>();
  wait_for_previous_kernel();
  const Shares shares = fusion_shares(p.maps);
  if (place.works) {
    EFFDET_NO_UNROLL
    for (int row = place.row; row < place.row + place.rows; ++row) {
      float sum[kVector<T>];
      fused_vector<T>(p.maps, shares, place.image, row, place.column, place.channel, sum);
      finish(result<T>(p, place, row, place.column), sum, p.act);
    }
  }
  let_next_kernel_start();
}

// Top-down: x[0] as it is, x[1] of half the size. A place is a pixel of that.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    weighted_fusion_fwd_halved_kernel(const WeightedFusionParams p, const Places places) {
  const Place place = places.of_thread<T>();
  wait_for_previous_kernel();
  const Shares shares = fusion_shares(p.maps);
  if (place.works) {
    const Map &whole = p.maps.x[0], &half = p.maps.x[1];
    const T* const x = fused_image<T>(p.maps, 0, place.image, place.channel);
    const T* const coarse = fused_image<T>(p.maps, 1, place.image, place.channel) + place.column * half.pixel_stride;
    EFFDET_NO_UNROLL
    for (int row = place.row; row < place.row + place.rows; ++row) {
      const uint4 above = load<uint4>(coarse + row * half.row_stride);
      uint4 own[4];
      EFFDET_UNROLL
      for (int i = 0; i < 4; ++i)
        own[i] =
            load<uint4>(x + (2 * row + i / 2) * whole.row_stride + (2 * place.column + i % 2) * whole.pixel_stride);
      float common[kVector<T>];
      widen_vector<T>(above, common);
      EFFDET_UNROLL
      for (int i = 0; i < 4; ++i) {
        float sum[kVector<T>];
        widen_vector<T>(own[i], sum);
        EFFDET_UNROLL
        for (int k = 0; k < kVector<T>; ++k) sum[k] = sum[k] * shares.values[0] + common[k] * shares.values[1];
        finish(result<T>(p, place, 2 * row + i / 2, 2 * place.column + i % 2), sum, p.act);
      }
    }
  }
  let_next_kernel_start();
}

// Bottom-up: up to two maps as they are, then one under a max-pool, of which each row is read once and the largest of
// the row that two windows share is kept.
template <typename T, int kDirect>
__global__ void __launch_bounds__(kThreads)
    weighted_fusion_fwd_pooled_kernel(const WeightedFusionParams p, const Places places) {
  const Place place = places.of_thread<T>();
  wait_for_previous_kernel();
  const Shares shares = fusion_shares(p.maps);
  if (place.works) {
    const Map& map = p.maps.x[kDirect];
    const WindowColumns columns(p.maps, map, place.column);
    const T* const x = fused_image<T>(p.maps, kDirect, place.image, place.channel);
    const T* direct[kDirect + 1];
    EFFDET_UNROLL
    for (int i = 0; i < kDirect; ++i)
      direct[i] = fused_image<T>(p.maps, i, place.image, place.channel) + place.column * p.maps.x[i].pixel_stride;
    WindowRow above;
    above.read(map, columns, x, 2 * place.row - p.maps.pool_top);
    uint4 shared = above.largest<T>();
    EFFDET_NO_UNROLL
    for (int row = place.row; row < place.row + place.rows; ++row) {
      WindowRow middle, below;
      middle.read(map, columns, x, 2 * row - p.maps.pool_top + 1);
      below.read(map, columns, x, 2 * row - p.maps.pool_top + 2);
      uint4 own[kDirect + 1];
      EFFDET_UNROLL
      for (int i = 0; i < kDirect; ++i) own[i] = load<uint4>(direct[i] + row * p.maps.x[i].row_stride);
      const uint4 best = larger<T>(shared, middle.largest<T>());
      shared = below.largest<T>();
      float sum[kVector<T>], values[kVector<T>];
      widen_vector<T>(larger<T>(best, shared), sum);
      EFFDET_UNROLL
      for (int k = 0; k < kVector<T>; ++k) sum[k] *= shares.values[kDirect];
      EFFDET_UNROLL
      for (int i = 0; i < kDirect; ++i) {
        widen_vector<T>(own[i], values);
        EFFDET_UNROLL
        for (int k = 0; k < kVector<T>; ++k) sum[k] += values[k] * shares.values[i];
      }
      finish(result<T>(p, place, row, place.column), sum, p.act);
    }
  }
  let_next_kernel_start();
}

template <typename T>
int launch_of(const WeightedFusionParams& p, void* stream) {
  const FusedMaps& maps = p.maps;
  const int vectors = p.channels / kVector<T>;
  if (maps.count == 2 && maps.resample[0] == kIdentity && maps.resample[1] == kHalved) {
    const Places places(maps.height / 2, maps.width / 2, vectors, p.rows);
    return launch(weighted_fusion_fwd_halved_kernel<T>, places.grid(p.batch), stream, p, places);
  }
  const Places places(maps.height, maps.width, vectors, p.rows);
  const Grid grid = places.grid(p.batch);
  bool pooled = maps.resample[maps.count - 1] == kMaxPool;
  for (int i = 0; i < maps.count - 1; ++i) pooled = pooled && maps.resample[i] == kIdentity;
  if (!pooled) return launch(weighted_fusion_fwd_kernel<T>, grid, stream, p, places);
  if (maps.count == 1) return launch(weighted_fusion_fwd_pooled_kernel<T, 0>, grid, stream, p, places);
  if (maps.count == 2) return launch(weighted_fusion_fwd_pooled_kernel<T, 1>, grid, stream, p, places);
  return launch(weighted_fusion_fwd_pooled_kernel<T, 2>, grid, stream, p, places);
}

}  // namespace

int weighted_fusion(const WeightedFusionParams& p, void* stream) {
  if (p.dtype == kFloat32) return launch_of<float>(p, stream);
  if (p.dtype == kBFloat16) return launch_of<BFloat16>(p, stream);
  return launch_of<Float16>(p, stream);
}

}  // namespace effdet::cuda
