// weighted_fusion, backward: one pass over the result and the maps for the nodes of a BiFPN, with the gradients of the
// maps in gather form; another pass per map where a map is interpolated, or pooled and not the last one. Sums for the
// weights' gradients are one row per block, which one more block adds up in order.
#include "cuda/activation.h"
#include "weighted_fusion/params_cuda.h"
#include "weighted_fusion/places.h"
#include "weighted_fusion/winners.h"

namespace effdet::cuda {
namespace {

constexpr int kWeightThreads = 256;

template <typename T>
__device__ __forceinline__ T* gradient(const FusionGradientParams& p, int i, std::int64_t image, int row, int column,
                                       int channel) {
  const Map& map = p.maps.x[i];
  return static_cast<T*>(p.dx[i]) + ((image * map.height + row) * map.width + column) * p.channels + channel;
}

template <typename T>
__device__ __forceinline__ const T* result_gradient(const FusionGradientParams& p, std::int64_t image, int row,
                                                    int column, int channel) {
  return static_cast<const T*>(p.grad.data) + image * p.grad.batch_stride + row * p.grad.row_stride +
         column * p.grad.pixel_stride + channel;
}

template <typename T>
__device__ __forceinline__ void store_scaled(T* at, const float (&values)[kVector<T>], float scale) {
  float scaled[kVector<T>];
  EFFDET_UNROLL
  for (int k = 0; k < kVector<T>; ++k) scaled[k] = values[k] * scale;
  store(at, narrow_vector<T>(scaled));
}

// Adds up what the threads of a block have, in an order that is always the same; thread 0 has the sums.
// `memory` has room for a number per warp and map.
__device__ __forceinline__ void block_sums(float (&sums)[kMaxFused], float* memory) {
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i) {
    EFFDET_UNROLL
    for (int bits = 1; bits < kWarp; bits *= 2) sums[i] += __shfl_xor_sync(kAll, sums[i], bits);
    if (lane_id() == 0) memory[warp_id() * kMaxFused + i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) EFFDET_UNROLL
    for (int i = 0; i < kMaxFused; ++i) sums[i] += memory[warp * kMaxFused + i];
  }
}

__device__ __forceinline__ void store_sums(const FusionGradientParams& p, float (&sums)[kMaxFused], float* memory) {
  if (!p.parts) return;
  block_sums(sums, memory);
  if (threadIdx.x != 0) return;
  EFFDET_UNROLL
  for (int i = 0; i < kMaxFused; ++i)
    if (i < p.maps.count) p.parts[static_cast<std::int64_t>(blockIdx.x) * p.maps.count + i] = sums[i];
}

template <int kCount>
__device__ __forceinline__ float dot(const float (&a)[kCount], const float (&b)[kCount]) {
  float sum = 0.0f;
  EFFDET_UNROLL
  for (int k = 0; k < kCount; ++k) sum += a[k] * b[k];
  return sum;
}

// Whether the maps are looked at: for the activation's slope or for the weights.
__device__ __forceinline__ bool reads_maps(const FusionGradientParams& p) {
  return p.act != kNone || p.parts;
}

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

// What a block does under a max-pool. A place (r, c) is the window of that result and the first two rows and columns
// of it: pixels that no other place has. Tiles overlap by a column, whose windows the first column of pixels needs.
struct PoolTiles {
  int height, width;           // places of an image
  int columns, vectors, rows;  // of a block
  int strips, tiles, blocks;

  explicit PoolTiles(const FusionGradientParams& p) : columns(p.columns), vectors(p.vectors), rows(p.rows) {
    const Map& map = p.maps.x[p.maps.count - 1];
    height = static_cast<int>(map.height + p.maps.pool_top + 1) / 2;
    width = static_cast<int>(map.width + p.maps.pool_left + 1) / 2;
    strips = divided(height, rows);
    tiles = columns < width ? divided(width - 1, columns - 1) : 1;
    blocks = divided(p.channels / static_cast<int>(16 / size_of(p.dtype)), vectors);
  }
  std::int64_t all(std::int64_t batch) const { return batch * strips * tiles * blocks; }
};

// total += the values of the channels whose window's maximum is tap kTap.
template <typename T, int kTap>
__device__ __forceinline__ void add_won(float (&total)[kVector<T>], const float (&values)[kVector<T>],
                                        const uint4& winners) {
  EFFDET_UNROLL
  for (int k = 0; k < kVector<T>; ++k)
    if (winner_of<T>(winners, k) == kTap) total[k] += values[k];
}

// Bottom-up: up to two maps as they are, then one under a max-pool. A thread walks down; of its windows' gradients,
// those of pixels in the column to its right go to the next thread through shared memory.
template <typename T, int kDirect>
__global__ void __launch_bounds__(kPoolThreads, 2)
    weighted_fusion_bwd_pooled_kernel(const FusionGradientParams p, const PoolTiles tiles) {
  constexpr int kQuads = kVector<T> / 4;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  Shared shared;
  float4* const passed = shared.take<float4>(2 * 2 * kQuads * threads);  // [buffer, row, quad, thread]
  float* const memory = shared.take<float>(kPoolThreads / kWarp * kMaxFused);

  unsigned part = blockIdx.x;
  const int vector = static_cast<int>(part % tiles.blocks) * tiles.vectors + thread % tiles.vectors;
  part /= tiles.blocks;
  const int tile = static_cast<int>(part % tiles.tiles);
  part /= tiles.tiles;
  const int first = static_cast<int>(part % tiles.strips) * tiles.rows;
  const std::int64_t image = part / tiles.strips;
  const int local = thread / tiles.vectors, channel = vector * kVector<T>;
  const int column = tile * (tiles.columns - 1) + local;
  const bool works = local < tiles.columns && column < tiles.width && channel < p.channels;
  const bool owns = works && (local > 0 || tile == 0);
  const int end = min(first + tiles.rows, tiles.height), start = max(first - 1, 0);

  wait_for_previous_kernel();
  const Shares shares = fusion_shares(p.maps);
  const Map& map = p.maps.x[kDirect];
  const WindowColumns columns(p.maps, map, column);
  const T* const x = fused_image<T>(p.maps, kDirect, image, works ? channel : 0);
  const bool reads = reads_maps(p);
  float sums[kMaxFused] = {};
  float before[kVector<T>] = {};  // the gradient of the window above, and where it goes
  uint4 winners_before = kNoWinners;
  WindowRow above{};
  if (works) above.read(map, columns, x, 2 * start - p.maps.pool_top);
  EFFDET_NO_UNROLL
  for (int row = start; row < end; ++row) {
    const bool owned = owns && row >= first;
    const int top = 2 * row - p.maps.pool_top, left = 2 * column - p.maps.pool_left;
    float delta[kVector<T>] = {};
    uint4 winners = kNoWinners;
    if (works && row < p.maps.height && column < p.maps.width) {
      WindowRow middle, below;
      middle.read(map, columns, x, top + 1);
      below.read(map, columns, x, top + 2);
      const uint4 grad = load<uint4>(result_gradient<T>(p, image, row, column, channel));
      uint4 own[kDirect + 1];
      EFFDET_UNROLL
      for (int i = 0; i < kDirect; ++i) {
        const Map& direct = p.maps.x[i];
        own[i] = reads ? load<uint4>(fused_image<T>(p.maps, i, image, channel) + row * direct.row_stride +
                                     column * direct.pixel_stride)
                       : uint4{0, 0, 0, 0};
      }
      const uint4 best = larger<T>(larger<T>(above.largest<T>(), middle.largest<T>()), below.largest<T>());
      winners = top < 0 || left < 0 || any_nan<T>(best) ? winners_by_rule<T>(map, x, top, left)
                                                        : first_winners<T>(best, above, middle, below);
      above = below;
      widen_vector<T>(grad, delta);
      if (reads) {
        float values[kDirect + 1][kVector<T>];
        EFFDET_UNROLL
        for (int i = 0; i < kDirect; ++i) widen_vector<T>(own[i], values[i]);
        widen_vector<T>(best, values[kDirect]);
        if (p.act != kNone) {
          float fused[kVector<T>];
          EFFDET_UNROLL
          for (int i = 0; i <= kDirect; ++i) EFFDET_UNROLL
          for (int k = 0; k < kVector<T>; ++k)
            fused[k] = i == 0 ? values[0][k] * shares.values[0] : fused[k] + values[i][k] * shares.values[i];
          slopes(fused, p.act);
          EFFDET_UNROLL
          for (int k = 0; k < kVector<T>; ++k) delta[k] *= fused[k];
        }
        if (owned) {
          EFFDET_UNROLL
          for (int i = 0; i <= kDirect; ++i) sums[i] += dot(delta, values[i]);
        }
      }
      EFFDET_UNROLL
      for (int i = 0; i < kDirect; ++i)
        if (owned && p.dx[i]) store_scaled(gradient<T>(p, i, image, row, column, channel), delta, shares.values[i]);
      EFFDET_UNROLL
      for (int k = 0; k < kVector<T>; ++k) delta[k] *= shares.values[kDirect];
    }
    // The third column of the window is the next place's first.
    float4* const buffer = passed + (row % 2) * 2 * kQuads * threads + thread;
    EFFDET_UNROLL
    for (int i = 0; i < 2; ++i) {
      float right[kVector<T>] = {};
      if (i == 0) {
        add_won<T, 2>(right, delta, winners);
        add_won<T, 8>(right, before, winners_before);
      } else {
        add_won<T, 5>(right, delta, winners);
      }
      EFFDET_UNROLL
      for (int q = 0; q < kQuads; ++q)
        buffer[(i * kQuads + q) * threads] = float4{right[4 * q], right[4 * q + 1], right[4 * q + 2], right[4 * q + 3]};
    }
    __syncthreads();
    if (owned) {
      EFFDET_UNROLL
      for (int i = 0; i < 2; ++i) {
        float pixels[2][kVector<T>] = {};
        if (local > 0) {
          EFFDET_UNROLL
          for (int q = 0; q < kQuads; ++q) {
            const float4 four = buffer[(i * kQuads + q) * threads - tiles.vectors];
            pixels[0][4 * q] = four.x;
            pixels[0][4 * q + 1] = four.y;
            pixels[0][4 * q + 2] = four.z;
            pixels[0][4 * q + 3] = four.w;
          }
        }
        if (i == 0) {
          add_won<T, 0>(pixels[0], delta, winners);
          add_won<T, 6>(pixels[0], before, winners_before);
          add_won<T, 1>(pixels[1], delta, winners);
          add_won<T, 7>(pixels[1], before, winners_before);
        } else {
          add_won<T, 3>(pixels[0], delta, winners);
          add_won<T, 4>(pixels[1], delta, winners);
        }
        EFFDET_UNROLL
        for (int j = 0; j < 2; ++j)
          if (top + i >= 0 && top + i < map.height && left + j >= 0 && left + j < map.width)
            store(gradient<T>(p, kDirect, image, top + i, left + j, channel), narrow_vector<T>(pixels[j]));
      }
    }
    EFFDET_UNROLL
    for (int k = 0; k < kVector<T>; ++k) before[k] = delta[k];
    winners_before = winners;
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
    const PoolTiles tiles(p);
    Grid grid;
    grid.blocks = tiles.all(p.batch);
    grid.threads = divided(tiles.columns * tiles.vectors, kWarp) * kWarp;
    grid.shared_bytes = Shared::rounded(std::size_t{2} * 2 * kVector<T> * sizeof(float) * grid.threads) +
                        Shared::rounded(kPoolThreads / kWarp * kMaxFused * sizeof(float));
    status = maps.count == 1   ? launch(weighted_fusion_bwd_pooled_kernel<T, 0>, grid, stream, p, tiles)
             : maps.count == 2 ? launch(weighted_fusion_bwd_pooled_kernel<T, 1>, grid, stream, p, tiles)
                               : launch(weighted_fusion_bwd_pooled_kernel<T, 2>, grid, stream, p, tiles);
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
  if (gradient_kernel(p) == GradientKernel::kPooled) return PoolTiles(p).all(p.batch);
  const Places places = p.dtype == kFloat32 ? places_of<float>(p) : places_of<BFloat16>(p);
  return places.grid(p.batch).blocks;
}

int weighted_fusion_gradient(const FusionGradientParams& p, void* stream) {
  if (p.dtype == kFloat32) return launch_of<float>(p, stream);
  if (p.dtype == kBFloat16) return launch_of<BFloat16>(p, stream);
  return launch_of<Float16>(p, stream);
}

}  // namespace effdet::cuda
