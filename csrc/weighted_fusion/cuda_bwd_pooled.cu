// weighted_fusion, backward of nodes with a pooled last map, in one pass: the gradients of all maps and the sums for
// the weights, each map read once but for the rows and columns that neighbouring blocks share.
#include "cuda/activation.h"
#include "weighted_fusion/gradient.h"
#include "weighted_fusion/winners.h"

namespace effdet::cuda {
namespace {

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

template <typename T>
int launch_of(const FusionGradientParams& p, void* stream) {
  const PoolTiles tiles(p);
  Grid grid;
  grid.blocks = tiles.all(p.batch);
  grid.threads = divided(tiles.columns * tiles.vectors, kWarp) * kWarp;
  grid.shared_bytes = Shared::rounded(std::size_t{2} * 2 * kVector<T> * sizeof(float) * grid.threads) +
                      Shared::rounded(kPoolThreads / kWarp * kMaxFused * sizeof(float));
  if (p.maps.count == 1) return launch(weighted_fusion_bwd_pooled_kernel<T, 0>, grid, stream, p, tiles);
  if (p.maps.count == 2) return launch(weighted_fusion_bwd_pooled_kernel<T, 1>, grid, stream, p, tiles);
  return launch(weighted_fusion_bwd_pooled_kernel<T, 2>, grid, stream, p, tiles);
}

}  // namespace

std::int64_t pooled_gradient_blocks(const FusionGradientParams& p) {
  return PoolTiles(p).all(p.batch);
}

int pooled_gradient(const FusionGradientParams& p, void* stream) {
  if (p.dtype == kFloat32) return launch_of<float>(p, stream);
  if (p.dtype == kBFloat16) return launch_of<BFloat16>(p, stream);
  return launch_of<Float16>(p, stream);
}

}  // namespace effdet::cuda
