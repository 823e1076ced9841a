// weighted_fusion, backward: one pass over the result and the maps for the nodes of a BiFPN, with the gradients of the
// maps in gather form (cuda_bwd_pooled.cu has that under a max-pool); another pass per map where a map is interpolated,
// or pooled and not the last one. Sums for the weights' gradients are one row per block, which one more block adds up
// in order.
#include "cuda/activation.h"
#include "weighted_fusion/gradient.h"
#include "weighted_fusion/winners.h"

namespace effdet::cuda {
namespace {

constexpr int kWeightThreads = 256;

// Any maps: all but the gradients of those that are not read as they are.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    weighted_fusion_bwd_kernel(const FusionGradientParams p, const Places places) {
  Shared shared;
  float* const memory = shared.take<float>(kThreads / kWarp * kMaxFused);
  const Place place = places.of_thread<T>();
  wait_for_previous_kernel();
  const Shares shares = fusion_shares(p.maps);
  float sums[kMaxFused] = {};
  if (place.works) {
    EFFDET_NO_UNROLL
    for (int row = place.row; row < place.row + place.rows; ++row) {
      const T* const grad = result_gradient<T>(p, place.image, row, place.column, place.channel);
      float delta[kVector<T>];
      widen_vector<T>(load<uint4>(grad), delta);
      if (reads_maps(p)) {
        float values[kMaxFused][kVector<T>], fused[kVector<T>];
        resampled_vectors<T>(p.maps, place.image, row, place.column, place.channel, values);
        if (p.act != kNone) {
          weighted_sum(p.maps, shares, values, fused);
          slopes(fused, p.act);
          EFFDET_UNROLL
          for (int k = 0; k < kVector<T>; ++k) delta[k] *= fused[k];
        }
        EFFDET_UNROLL
        for (int i = 0; i < kMaxFused; ++i) sums[i] += dot(delta, values[i]);
      }
      if (p.delta) {
        float* const at =
            p.delta + ((place.image * p.maps.height + row) * p.maps.width + place.column) * p.channels + place.channel;
        EFFDET_UNROLL
        for (int k = 0; k < kVector<T>; k += 4)
          store(at + k, float4{delta[k], delta[k + 1], delta[k + 2], delta[k + 3]});
      }
      EFFDET_UNROLL
      for (int i = 0; i < kMaxFused; ++i)
        if (i < p.maps.count && p.maps.resample[i] == kIdentity && p.dx[i])
          store_scaled(gradient<T>(p, i, place.image, row, place.column, place.channel), delta, shares.values[i]);
    }
  }
  let_next_kernel_start();
  store_sums(p, sums, memory);
}

// Top-down: x[0] as it is, x[1] of half the size, of which a place is a pixel.
template <typename T>
__global__ void __launch_bounds__(kThreads, 5)
    weighted_fusion_bwd_halved_kernel(const FusionGradientParams p, const Places places) {
  Shared shared;
  float* const memory = shared.take<float>(kThreads / kWarp * kMaxFused);
  const Place place = places.of_thread<T>();
  wait_for_previous_kernel();
  const Shares shares = fusion_shares(p.maps);
  float sums[kMaxFused] = {};
  if (place.works) {
    const Map &whole = p.maps.x[0], &half = p.maps.x[1];
    const T* const x = fused_image<T>(p.maps, 0, place.image, place.channel);
    const T* const coarse = fused_image<T>(p.maps, 1, place.image, place.channel) + place.column * half.pixel_stride;
    const bool reads = reads_maps(p);
    EFFDET_NO_UNROLL
    for (int row = place.row; row < place.row + place.rows; ++row) {
      const uint4 none{0, 0, 0, 0};
      const uint4 above = reads ? load<uint4>(coarse + row * half.row_stride) : none;
      uint4 own[4], grads[4];
      EFFDET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int h = 2 * row + i / 2, w = 2 * place.column + i % 2;
        grads[i] = load<uint4>(result_gradient<T>(p, place.image, h, w, place.channel));
        own[i] = reads ? load<uint4>(x + h * whole.row_stride + w * whole.pixel_stride) : none;
      }
      float common[kVector<T>], total[kVector<T>];
      widen_vector<T>(above, common);
      EFFDET_UNROLL
      for (int i = 0; i < 4; ++i) {
        float delta[kVector<T>], values[kVector<T>];
        widen_vector<T>(grads[i], delta);
        widen_vector<T>(own[i], values);
        if (p.act != kNone) {
          float fused[kVector<T>];
          EFFDET_UNROLL
          for (int k = 0; k < kVector<T>; ++k) fused[k] = values[k] * shares.values[0] + common[k] * shares.values[1];
          slopes(fused, p.act);
          EFFDET_UNROLL
          for (int k = 0; k < kVector<T>; ++k) delta[k] *= fused[k];
        }
        EFFDET_UNROLL
        for (int k = 0; k < kVector<T>; ++k) total[k] = i == 0 ? delta[k] : total[k] + delta[k];
        sums[0] += dot(delta, values);
        if (p.dx[0])
          store_scaled(gradient<T>(p, 0, place.image, 2 * row + i / 2, 2 * place.column + i % 2, place.channel), delta,
                       shares.values[0]);
      }
      sums[1] += dot(total, common);
      if (p.dx[1])
        store_scaled(gradient<T>(p, 1, place.image, row, place.column, place.channel), total, shares.values[1]);
    }
  }
  let_next_kernel_start();
  store_sums(p, sums, memory);
}

// delta of a pixel of the result: as it was stored, or the result's gradient where there is no activation.
template <typename T>
__device__ __forceinline__ void read_delta(const FusionGradientParams& p, std::int64_t image, int row, int column,
                                           int channel, float (&delta)[kVector<T>]) {
  if (!p.delta) return widen_vector<T>(load<uint4>(result_gradient<T>(p, image, row, column, channel)), delta);
  const float* const at = p.delta + ((image * p.maps.height + row) * p.maps.width + column) * p.channels + channel;
  EFFDET_UNROLL
  for (int k = 0; k < kVector<T>; k += 4) {
    const float4 four = load<float4>(at + k);
    delta[k] = four.x;
    delta[k + 1] = four.y;
    delta[k + 2] = four.z;
    delta[k + 3] = four.w;
  }
}

// What pixel `source` of `size` is multiplied by in pixel `place` of `of`.
__device__ __forceinline__ float weight_of(int how, int place, int source, int size, int of) {
  if (how == kHalved) return place >> 1 == source ? 1.0f : 0.0f;
  if (how == kNearest) return nearest_place(place, size, of) == source ? 1.0f : 0.0f;
  const Between found = between(place, size, of);
  return (found.first == source ? 1.0f - found.weight : 0.0f) + (found.second == source ? found.weight : 0.0f);
}

// The gradient of map i, by a look at all pixels of the result that may have looked at a pixel of it.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    weighted_fusion_bwd_gather_kernel(const FusionGradientParams p, const Places places, const int i) {
  const Place place = places.of_thread<T>();
  wait_for_previous_kernel();
  const Shares shares = fusion_shares(p.maps);
  const float share = i == 0 ? shares.values[0] : i == 1 ? shares.values[1] : shares.values[2];
  const Map& map = p.maps.x[i];
  const int how = p.maps.resample[i], height = static_cast<int>(map.height), width = static_cast<int>(map.width);
  if (place.works) {
    float total[kVector<T>] = {}, delta[kVector<T>];
    if (how == kMaxPool) {
      const T* const x = fused_image<T>(p.maps, i, place.image, place.channel);
      const int down = place.row + p.maps.pool_top, right = place.column + p.maps.pool_left;
      EFFDET_NO_UNROLL
      for (int window = 0; window < 4; ++window) {
        const int r = down / 2 - window / 2, c = right / 2 - window % 2;
        const int tap = (down - 2 * r) * 3 + right - 2 * c;
        const bool has = down - 2 * r < 3 && right - 2 * c < 3;
        if (!has || r < 0 || r >= p.maps.height || c < 0 || c >= p.maps.width) continue;
        read_delta<T>(p, place.image, r, c, place.channel, delta);
        const uint4 winners = winners_by_rule<T>(map, x, 2 * r - p.maps.pool_top, 2 * c - p.maps.pool_left);
        EFFDET_UNROLL
        for (int k = 0; k < kVector<T>; ++k)
          if (winner_of<T>(winners, k) == static_cast<unsigned>(tap)) total[k] += delta[k];
      }
    } else {
      const int reach_h = 2 * p.maps.height / height + 4, reach_w = 2 * p.maps.width / width + 4;
      const int first_r = static_cast<int>((2 * std::int64_t{place.row} - 1) * p.maps.height / (2 * height)) - 1;
      const int first_c = static_cast<int>((2 * std::int64_t{place.column} - 1) * p.maps.width / (2 * width)) - 1;
      EFFDET_NO_UNROLL
      for (int r = max(first_r, 0); r < min(first_r + reach_h, p.maps.height); ++r) {
        const float down = weight_of(how, r, place.row, height, p.maps.height);
        if (down == 0.0f) continue;
        EFFDET_NO_UNROLL
        for (int c = max(first_c, 0); c < min(first_c + reach_w, p.maps.width); ++c) {
          const float factor = down * weight_of(how, c, place.column, width, p.maps.width);
          if (factor == 0.0f) continue;
          read_delta<T>(p, place.image, r, c, place.channel, delta);
          EFFDET_UNROLL
          for (int k = 0; k < kVector<T>; ++k) total[k] += factor * delta[k];
        }
      }
    }
    store_scaled(gradient<T>(p, i, place.image, place.row, place.column, place.channel), total, share);
  }
  let_next_kernel_start();
}

// From the sums of all blocks to the gradient of the weights; one block.
__global__ void __launch_bounds__(kWeightThreads) weighted_fusion_bwd_weight_kernel(const FusionGradientParams p) {
  Shared shared;
  float* const memory = shared.take<float>(kWeightThreads / kWarp * kMaxFused);
  wait_for_previous_kernel();
  float sums[kMaxFused] = {};
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    if (i < p.maps.count) {
      for (std::int64_t block = threadIdx.x; block < p.blocks; block += kWeightThreads)
        sums[i] += p.parts[block * p.maps.count + i];
    }
  }
  let_next_kernel_start();
  block_sums(sums, memory);
  if (threadIdx.x != 0) return;
  const Shares shares = fusion_shares(p.maps);
  const float mean = dot(sums, shares.values);
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    if (i < p.maps.count) {
      const float factor = p.maps.method == kSoftmax         ? shares.values[i]
                           : fusion_weight(p.maps, i) > 0.0f ? 1.0f / shares.total
                                                             : 0.0f;
      p.of_weight[i] = factor * (sums[i] - mean);
    }
  }
}

template <typename T>
Places places_of(const FusionGradientParams& p) {
  const int part = gradient_kernel(p) == GradientKernel::kHalved ? 2 : 1;
  return {p.maps.height / part, p.maps.width / part, p.channels / kVector<T>, p.rows};
}

template <typename T>
int launch_of(const FusionGradientParams& p, void* stream) {
  const GradientKernel kernel = gradient_kernel(p);
  const FusedMaps& maps = p.maps;
  int status;
  if (kernel == GradientKernel::kPooled) {
    status = pooled_gradient(p, stream);
  } else {
    const Places places = places_of<T>(p);
    Grid grid = places.grid(p.batch);
    grid.shared_bytes = Shared::rounded(kThreads / kWarp * kMaxFused * sizeof(float));
    status = kernel == GradientKernel::kHalved ? launch(weighted_fusion_bwd_halved_kernel<T>, grid, stream, p, places)
                                               : launch(weighted_fusion_bwd_kernel<T>, grid, stream, p, places);
  }
  if (status == kOk && p.parts) {
    const Grid one{1, kWeightThreads, Shared::rounded(kWeightThreads / kWarp * kMaxFused * sizeof(float))};
    status = launch(weighted_fusion_bwd_weight_kernel, one, stream, p);
  }
  if (kernel != GradientKernel::kEach) return status;
  for (int i = 0; i < maps.count && status == kOk; ++i) {
    if (!p.dx[i] || maps.resample[i] == kIdentity) continue;
    const Places pixels(static_cast<int>(maps.x[i].height), static_cast<int>(maps.x[i].width), p.channels / kVector<T>,
                        1);
    status = launch(weighted_fusion_bwd_gather_kernel<T>, pixels.grid(p.batch), stream, p, pixels, i);
  }
  return status;
}

}  // namespace

GradientKernel gradient_kernel(const FusionGradientParams& p) {
  const FusedMaps& maps = p.maps;
  const int last = maps.count - 1;
  for (int i = 0; i < last; ++i)
    if (maps.resample[i] != kIdentity) return GradientKernel::kEach;
  if (maps.resample[last] == kMaxPool && p.dx[last]) return GradientKernel::kPooled;
  return maps.count == 2 && maps.resample[last] == kHalved ? GradientKernel::kHalved : GradientKernel::kEach;
}

std::int64_t gradient_blocks(const FusionGradientParams& p) {
  if (gradient_kernel(p) == GradientKernel::kPooled) return pooled_gradient_blocks(p);
  const Places places = p.dtype == kFloat32 ? places_of<float>(p) : places_of<BFloat16>(p);
  return places.grid(p.batch).blocks;
}

int weighted_fusion_gradient(const FusionGradientParams& p, void* stream) {
  if (p.dtype == kFloat32) return launch_of<float>(p, stream);
  if (p.dtype == kBFloat16) return launch_of<BFloat16>(p, stream);
  return launch_of<Float16>(p, stream);
}

}  // namespace effdet::cuda
