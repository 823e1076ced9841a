// The kernel of separable_conv's forward: a block makes all output channels of a tile of a level. The patch around the
// tile is copied into shared memory in slices of channels, convolved there in place, slice by slice, and is then the
// left operand of the product with the pointwise weights, which pass through a ring. What the design costs, and what
// others would, is in effdet_kernels/ops/separable_conv/README.md.
#pragma once

#include <algorithm>

#include "cuda/fusion.h"
#include "cuda/launch.h"
#include "separable_conv/cuda_product.h"

namespace effdet::cuda {

struct NotFused {};

// What is fixed when a kernel is compiled.
template <typename T, int kRows>
struct Shape {
  static constexpr int kTiles = sizeof(T) == 2 && kRows == 8 ? 2 : 1;  // rows of a tile that a warp multiplies
  static constexpr int kDown = kRows / kTiles;                         // warps, one below another
  static constexpr int kPatch = (kRows + 2) * kPatchWidth;             // pixels
  using Sums = Product<T, kTiles>;
};

// x, of which the compiler does not know that it is the same as in the last turn of a loop: what follows from it is
// computed anew instead of kept in registers.
__device__ __forceinline__ int fresh(int x) {
#ifndef EFFDET_EMULATED
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Waits for all groups of copies but the newest `left`, or 8 of them.
__device__ __forceinline__ void wait_for_all_but(int left) {
  switch (left) {
    case 0:
      return wait_for_copies<0>();
    case 1:
      return wait_for_copies<1>();
    case 2:
      return wait_for_copies<2>();
    case 3:
      return wait_for_copies<3>();
    case 4:
      return wait_for_copies<4>();
    case 5:
      return wait_for_copies<5>();
    case 6:
      return wait_for_copies<6>();
    case 7:
      return wait_for_copies<7>();
    default:
      return wait_for_copies<8>();
  }
}

// Maps: NotFused, or FusedMaps, whose weighted sum is the map that is convolved. kVectors: 16-byte vectors of the input
// channels, all of them a stage of the ring; or 0 for any number.
template <typename T, int kRows, int kVectors, typename Maps>
__global__ void __launch_bounds__(kWarp* kMostWarps, 2)
    separable_conv_fwd_kernel(const SeparableParams p, const SeparableCuts cuts, const Maps maps) {
  constexpr bool kFused = std::is_same_v<Maps, FusedMaps>;
  using S = Shape<T, kRows>;
  using Sums = typename S::Sums;
  const int threads = kWarp * p.warps, thread = static_cast<int>(threadIdx.x & (kWarp * kMostWarps - 1));
  const int across = p.warps / S::kDown;         // warps, side by side in the output channels
  const int panel = kGroup * p.groups * across;  // output channels of a stage of the ring
  const int vectors = kVectors ? kVectors : cuts.vectors, existing = kVectors ? kVectors : p.channels / kVector<T>;
  const int slices = kVectors ? divided(kVectors, kSliceVectors) : cuts.slices;
  const int pieces = kVectors ? 1 : cuts.pieces, depth = kVectors ? kVectors : p.depth;
  const int pitch = kVectors ? kVectors | 1 : cuts.pitch, stage_pitch = kVectors ? kVectors | 1 : cuts.stage_pitch;
  Shared shared;
  T* const taps = shared.take<T>(kTaps * existing * kVector<T>);
  uint4* const patch = shared.take<uint4>(S::kPatch * pitch);
  uint4* const ring = shared.take<uint4>(p.stages * panel * stage_pitch);
  float* const affine = shared.take<float>(2 * cuts.padded);  // scale and shift of each output channel

  int at = 0;
  while (!kFused && at + 1 < p.count && static_cast<int>(blockIdx.x) >= p.levels[at + 1].first) ++at;
  const int block = static_cast<int>(blockIdx.x) - p.levels[at].first;
  const SeparableLevel& level = p.levels[at];
  const int nets = kFused ? 1 : p.nets, net = nets == 1 ? 0 : block % kMostNets;
  const unsigned of_net = nets == 1 ? block : block / kMostNets, tiles = level.tiles, across_tiles = level.across;
  const int image = static_cast<int>(of_net / tiles);
  const unsigned tile = of_net % tiles;
  const int top = static_cast<int>(tile / across_tiles) * kRows;
  const int left = static_cast<int>(tile % across_tiles) * kTileWidth;
  const int height = level.height, width = level.width, out_channels = p.out_channels[net];

  wait_for_previous_kernel();
  for (int i = thread; i < kTaps * existing; i += threads)
    begin_copy16(taps + i * kVector<T>, static_cast<const T*>(p.dw_weight[net]) + i * kVector<T>, true);
  // Visits this thread's vectors of a slice of the patch: f(vector of channels, pixel, row, column), of the map.
  const auto each_of_slice = [&](int slice, auto&& f) {
    const int vector = slice * kSliceVectors + thread % kSliceVectors, step = threads / kSliceVectors;
    if (vector >= vectors) return;
    for (int pixel = thread / kSliceVectors; pixel < S::kPatch; pixel += step) {
      const int row = static_cast<int>(static_cast<unsigned>(pixel) / kPatchWidth);
      f(vector, pixel, top - 1 + row, left - 1 + pixel - row * kPatchWidth);
    }
  };
  if constexpr (kFused) {
    end_copies();
  } else {
    const T* const x = static_cast<const T*>(level.x[net].data) + image * level.x[net].batch_stride;
    const int row_stride = static_cast<int>(level.x[net].row_stride);
    const int pixel_stride = static_cast<int>(level.x[net].pixel_stride);
    for (int slice = 0; slice < slices; ++slice) {
      each_of_slice(slice, [&](int vector, int pixel, int h, int w) {
        const bool exists = vector < existing && within(h, height) && within(w, width);
        begin_copy16(patch + pixel * pitch + vector, x + (h * row_stride + w * pixel_stride + vector * kVector<T>),
                     exists);
      });
      end_copies();
    }
  }

  const T* const pw_weight = static_cast<const T*>(p.pw_weight[net]);
  const bool wide = out_channels % kVector<T> == 0;
  const int stages = p.turns[net];
  const int ring_vector = static_cast<int>(static_cast<unsigned>(thread) % static_cast<unsigned>(depth));
  const int ring_row = static_cast<int>(static_cast<unsigned>(thread) / static_cast<unsigned>(depth));
  struct Place {  // of a stage
    int slot, piece, channel;
  };
  const auto next = [&](Place place) {
    place.slot = place.slot + 1 < p.stages ? place.slot + 1 : 0;
    if (++place.piece == pieces) {
      place.piece = 0;
      place.channel += panel;
    }
    return place;
  };
  Place begins{0, 0, 0};
  const auto begin_stage = [&] {
    const int vector = begins.piece * depth + ring_vector;
    if (ring_row < cuts.ring_step && vector < vectors) {
      uint4* to = ring + (begins.slot * panel + ring_row) * stage_pitch + ring_vector;
      const T* const from = pw_weight + vector * kVector<T>;
      const int rows = min(panel, divided(out_channels - begins.channel, kGroup) * kGroup);
      for (int row = ring_row; row < rows; row += cuts.ring_step) {
        const int c = begins.channel + static_cast<int>(Sums::channel_of_row(static_cast<unsigned>(row), wide));
        begin_copy16(to, from + c * existing * kVector<T>, c < out_channels && vector < existing);
        to += cuts.ring_step * stage_pitch;
      }
    }
    end_copies();
    begins = next(begins);
  };
  int begun = 0;  // stages
  for (; begun < min(p.stages, stages); ++begun) begin_stage();

  EFFDET_NO_UNROLL
  for (int c = thread; c < cuts.padded; c += threads) {
    const bool exists = c < out_channels;
    store(affine + 2 * c, float2{exists && level.scale[net] ? level.scale[net][c] : 1.0f,
                                 exists && level.shift[net] ? level.shift[net][c] : 0.0f});
  }
  Shares shares;
  if constexpr (kFused) shares = fusion_shares(maps);

  EFFDET_NO_UNROLL
  for (int slice = 0; slice < slices; ++slice) {
    if constexpr (kFused) {
      each_of_slice(slice, [&](int vector, int pixel, int h, int w) {
        float values[kVector<T>] = {};
        if (vector < existing && within(h, height) && within(w, width)) {
          fused_vector<T>(maps, shares, image, h, w, vector * kVector<T>, values);
          activate(values, p.pre_act);
        }
        store(patch + pixel * pitch + vector, narrow_vector<T>(values));
      });
      if (slice == 0) wait_for_all_but(begun);  // the taps are there
    } else {
      wait_for_all_but(slices - 1 - slice + begun);
      if (p.pre_act != kNone) {
        each_of_slice(slice, [&](int vector, int pixel, int, int) {
          uint4& place = patch[pixel * pitch + vector];
          float values[kVector<T>];
          widen_vector<T>(place, values);
          activate(values, p.pre_act);
          place = narrow_vector<T>(values);
        });
      }
    }
    __syncthreads();
    const int first = slice * kSliceVectors, end = min(existing, first + kSliceVectors);
    if constexpr (sizeof(T) == 2) {
      for (int vector = first + warp_id(); vector < end; vector += p.warps)
        convolve<T, kRows>(patch + vector, pitch, taps + vector * kVector<T> * kTaps, patch + vector, pitch,
                           kPatchWidth);
    } else {
      for (int pair = first + 2 * warp_id(); pair < end; pair += 2 * p.warps) {
        const int vector = pair + lane_id() / 16;
        convolve<kRows>(reinterpret_cast<float4*>(patch) + vector, pitch, taps + vector * kVector<T> * kTaps,
                        vector < end);
      }
    }
  }

  const std::int64_t first_pixel = static_cast<std::int64_t>(image) * height * width;
  T* const y = static_cast<T*>(level.y[net]) + first_pixel * out_channels;
  Sums sums;
  Place place{0, 0, 0};
  for (int stage = 0; stage < stages; ++stage, place = next(place)) {
    wait_for_all_but(begun - 1 - stage);
    __syncthreads();  // and before the next copies into what was read
    if (stage > 0 && begun < stages) {
      begin_stage();
      ++begun;
    }
    const int warp = fresh(warp_id());
    const int first_row = warp % S::kDown * S::kTiles, warp_channel = warp / S::kDown * kGroup * p.groups;
    const int channel = place.channel + warp_channel;
    const int groups = min(p.groups, divided(out_channels - channel, kGroup));  // none: not positive
    if (place.piece == 0) sums.clear();
    if (groups > 0) {
      const int first = place.piece * depth;
      sums.add(patch + first_row * kPatchWidth * pitch + first, pitch,
               ring + (place.slot * panel + warp_channel) * stage_pitch, stage_pitch, min(depth, vectors - first),
               groups);
    }
    if (place.piece < pieces - 1) continue;
    if (stage == stages - 1) let_next_kernel_start();
    const int row = top + first_row, column = fresh(left) + Sums::column(0);
    EFFDET_UNROLL
    for (int group = 0; group < 2; ++group) {
      if (group >= groups) continue;
      const int begin = channel + group * kGroup;
      constexpr int kMine = Sums::kPixels * Sums::kChannels;
      float values[S::kTiles * kMine];
      EFFDET_UNROLL
      for (int i = 0; i < Sums::kChannels; i += Sums::kPair) {
        float factors[Sums::kPair], addends[Sums::kPair];
        Sums::load_affine(affine + 2 * (begin + Sums::channel(i, wide)), factors, addends);
        EFFDET_UNROLL
        for (int k = 0; k < S::kTiles * Sums::kPixels * Sums::kPair; ++k) {
          const int pixel = k / Sums::kPair, c = k % Sums::kPair;
          const float sum = sums.value(group, pixel / Sums::kPixels, pixel % Sums::kPixels, i + c);
          values[pixel * Sums::kChannels + i + c] = sum * factors[c] + addends[c];
        }
      }
      activate(values, p.act);
      const int c = begin + Sums::channel(0, wide);
      T* const first = y + ((row * width + column) * out_channels + c);
      EFFDET_UNROLL
      for (int k = 0; k < S::kTiles * Sums::kPixels; ++k) {
        const int down = k / Sums::kPixels, right = Sums::column(k % Sums::kPixels) - Sums::column(0);
        if (row + down < height && column + right < width)
          Sums::write(first + (down * width + right) * out_channels, values + k * Sums::kChannels, out_channels - c,
                      wide);
      }
    }
  }
}

template <typename T, int kRows, int kVectors = 0, typename Maps>
int launch_separable(SeparableParams p, const Maps& maps, void* stream) {
  using S = Shape<T, kRows>;
  SeparableCuts cuts{};
  std::int64_t blocks = 0;
  for (int i = 0; i < p.count; ++i) {
    SeparableLevel& level = p.levels[i];
    level.first = static_cast<int>(blocks);
    level.across = divided(level.width, kTileWidth);
    level.tiles = level.across * divided(level.height, kRows);
    blocks += p.batch * level.tiles * p.nets;
    if (blocks > kMostBlocks) return kBadSize;
  }
  const int step = S::Sums::kStep;
  cuts.vectors = divided(p.channels / kVector<T>, step) * step;
  cuts.pitch = cuts.vectors | 1;  // odd, so that neighbours lie in different banks
  cuts.stage_pitch = p.depth | 1;
  cuts.slices = divided(cuts.vectors, kSliceVectors);
  cuts.pieces = divided(cuts.vectors, p.depth);
  cuts.ring_step = kWarp * p.warps / p.depth;
  const int panel = kGroup * p.groups * (p.warps / S::kDown);
  for (int net = 0; net < p.nets; ++net) {
    p.turns[net] = divided(p.out_channels[net], panel) * cuts.pieces;
    if (p.stages < 2 && p.turns[net] > 1) return kBadParameter;
    cuts.padded = std::max(cuts.padded, divided(p.out_channels[net], kGroup) * kGroup);
  }
  Grid grid;
  grid.blocks = blocks;
  grid.threads = kWarp * p.warps;
  grid.shared_bytes = Shared::rounded(kTaps * p.channels * sizeof(T)) + std::size_t{16} * S::kPatch * cuts.pitch +
                      std::size_t{16} * p.stages * panel * cuts.stage_pitch + std::size_t{8} * cuts.padded;
  return launch(separable_conv_fwd_kernel<T, kRows, kVectors, Maps>, grid, stream, p, cuts, maps);
}

template <typename T, typename Maps>
int launch_short(const SeparableParams& p, const Maps& maps, void* stream) {
  constexpr int kOften = 8;  // vectors: D0's 64 channels
  if (p.rows == 8 && p.channels == kOften * kVector<T> && p.depth == kOften)
    return launch_separable<T, 8, kOften>(p, maps, stream);
  if (p.rows == 8) return launch_separable<T, 8>(p, maps, stream);
  return p.rows == 4 ? launch_separable<T, 4>(p, maps, stream) : launch_separable<T, 2>(p, maps, stream);
}

template <typename Maps>
int launch_separable(const SeparableParams& p, const Maps& maps, void* stream) {
  if (p.dtype == kBFloat16) return launch_short<BFloat16>(p, maps, stream);
  if (p.dtype == kFloat16) return launch_short<Float16>(p, maps, stream);
  if (p.rows == 4) return launch_separable<float, 4>(p, maps, stream);
  return p.rows == 2 ? launch_separable<float, 2>(p, maps, stream) : launch_separable<float, 1>(p, maps, stream);
}

}  // namespace effdet::cuda
