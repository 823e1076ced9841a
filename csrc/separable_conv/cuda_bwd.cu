// The gradients of separable_conv's maps and weights in one pass over x and the gradient of the raw result, 16 bits.
//
// With m = dw * x and y = pw m, for a tile of pixels and all channels:
//   d_pw += grad^T m,   e = grad pw,   dx = e convolved with the taps flipped,   d_dw[i, j] += x shifted . e.
// A block takes tiles of one net, one after the other. Of each it has the patches of x and grad, tile and border, in
// shared memory; m and, later, dx are of the tile alone, e takes the place of grad. d_pw stays in registers, d_dw in
// shared memory, until the last tile. What the design costs is in effdet_kernels/ops/separable_conv/README.md.
#include <algorithm>

#include "cuda/launch.h"
#include "separable_conv/cuda_depthwise.h"

namespace effdet::cuda {
namespace {

constexpr int kRows = 8, kPixels = kRows * kTileWidth;  // of a tile
constexpr int kPatchPixels = (kRows + 2) * kPatchWidth;
constexpr int kPatchTiles = divided(kPatchPixels, 16);  // of 16 pixels

// In 16-byte vectors of channels; a pitch is odd, so that pixels next to each other lie in different banks.
struct Cuts {
  int x, x_pitch;          // of a pixel of x
  int grad, grad_pitch;    // of the widest net's gradient, to whole operands; e has the same place
  int wide, middle_pitch;  // of m, to whole groups; the weights have the same
  int tiles;               // of all images and levels
};

// kSteps: operands of 16 output channels, at most; kGroups: of 32 channels of x.
template <int kSteps, int kGroups>
struct Shape {
  static constexpr bool kSmall = kSteps * kGroups <= 8;
  static constexpr int kWarps = kSmall ? 8 : 12, kThreads = kWarp * kWarps;
  static constexpr int kBlocks = divided(kSteps * kGroups, kWarps);  // of 16 by 32 sums for d_pw, of a warp
  static constexpr int kResident = kSmall ? 2 : 1;                   // blocks of a multiprocessor
};

// sums [16, 32] += grad^T m over the tile's pixels; `grad`: of its first pixel in the patch.
template <typename T>
__device__ __forceinline__ void add_outer(Products (&sums)[4], const uint4* grad, int grad_pitch, const uint4* middle,
                                          int middle_pitch) {
  const int lane = lane_id();
  const uint4* const left = grad + (lane % 8 + lane / 16 * 8) * grad_pitch + lane / 8 % 2;
  const uint4* const right = middle + (lane % 8 + lane / 8 % 2 * 8) * middle_pitch + lane / 16;
  EFFDET_UNROLL
  for (int row = 0; row < kRows; ++row) {
    const LeftOperand a = load_matrices<true>(left + row * kPatchWidth * grad_pitch);
    EFFDET_UNROLL
    for (int i = 0; i < 2; ++i) {
      const LeftOperand b = load_matrices<true>(right + row * kTileWidth * middle_pitch + 2 * i);
      multiply_add<T>(sums[2 * i], a, {b.words[0], b.words[1]});
      multiply_add<T>(sums[2 * i + 1], a, {b.words[2], b.words[3]});
    }
  }
}

// e = grad pw of 16 pixels, in the place of grad.
template <typename T, int kSteps>
__device__ __forceinline__ void multiply_in_place(uint4* pixels, int pitch, const uint4* weights, int weight_pitch,
                                                  int steps, int groups, int vectors) {
  const int lane = lane_id();
  LeftOperand left[kSteps];
  EFFDET_UNROLL
  for (int k = 0; k < kSteps; ++k)
    if (k < steps) left[k] = load_matrices<false>(pixels + lane % 16 * pitch + 2 * k + lane / 16);
  __syncwarp();
  const uint4* const right = weights + (lane % 8 + lane / 8 % 2 * 8) * weight_pitch + lane / 16;
  EFFDET_NO_UNROLL
  for (int group = 0; group < groups; ++group) {
    Products sums[4] = {};
    EFFDET_UNROLL
    for (int k = 0; k < kSteps; ++k) {
      if (k >= steps) continue;
      EFFDET_UNROLL
      for (int i = 0; i < 2; ++i) {
        const LeftOperand b = load_matrices<true>(right + 16 * k * weight_pitch + 4 * group + 2 * i);
        multiply_add<T>(sums[2 * i], left[k], {b.words[0], b.words[1]});
        multiply_add<T>(sums[2 * i + 1], left[k], {b.words[2], b.words[3]});
      }
    }
    EFFDET_UNROLL
    for (int i = 0; i < 8; ++i) {
      const int v = 4 * group + i / 2, half = i % 2;
      if (v < vectors)
        store(reinterpret_cast<unsigned*>(pixels + (lane / 4 + 8 * half) * pitch + v) + lane % 4,
              narrow_pair<T>(sums[i / 2].values[2 * half], sums[i / 2].values[2 * half + 1]));
    }
  }
}

// d_dw [8, 9] of 8 channels over the tile's pixels: of two taps in a row, 8 channels each, by 16 pixels of e, times the
// pixels of x by 8 channels; of the result [16, 8] the two diagonals count. Tap 2 is a pair with itself.
template <typename T>
__device__ __forceinline__ void add_taps(float* d_dw, const uint4* x, int x_pitch, const uint4* e, int e_pitch) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  RightOperand pixels[kRows];
  EFFDET_UNROLL
  for (int r = 0; r < kRows; r += 2) {
    const LeftOperand both =
        load_matrices<true>(x + ((r + 1 + lane / 16) * kPatchWidth + 1 + lane % 8 + lane / 8 % 2 * 8) * x_pitch);
    pixels[r] = {both.words[0], both.words[1]};
    pixels[r + 1] = {both.words[2], both.words[3]};
  }
  Products sums[3][2] = {};
  EFFDET_UNROLL
  for (int pair = 0; pair < 2; ++pair) {
    const int tap = pair == 0 ? lane / 8 % 2 : 2;
    const uint4* const left = e + (lane % 8 + lane / 16 * 8 + 2 - tap) * e_pitch;
    EFFDET_UNROLL
    for (int row = 0; row < kRows + 2; ++row) {
      const LeftOperand of_row = load_matrices<true>(left + row * kPatchWidth * e_pitch);
      EFFDET_UNROLL
      for (int i = 0; i < 3; ++i) {
        const int r = row - 2 + i;
        if (r >= 0 && r < kRows) multiply_add<T>(sums[i][pair], of_row, pixels[r]);
      }
    }
  }
  if (t != g / 2) return;
  EFFDET_UNROLL
  for (int i = 0; i < 3; ++i) {
    float* const row = d_dw + g * kTaps + 3 * i;
    const float (&first)[4] = sums[i][0].values, (&last)[4] = sums[i][1].values;
    row[0] += g % 2 == 0 ? first[0] : first[1];
    row[1] += g % 2 == 0 ? first[2] : first[3];
    row[2] += g % 2 == 0 ? last[0] : last[1];
  }
}

template <typename T, int kSteps, int kGroups>
__global__ void __launch_bounds__(Shape<kSteps, kGroups>::kThreads, Shape<kSteps, kGroups>::kResident)
    separable_conv_bwd_kernel(const SeparableGradientParams p, const Cuts cuts) {
  using S = Shape<kSteps, kGroups>;
  constexpr int kWarps = S::kWarps, kThreads = S::kThreads, kBlocks = S::kBlocks;
  Shared shared;
  T* const taps = shared.take<T>(kTaps * p.channels);
  uint4* const x = shared.take<uint4>(kPatchPixels * cuts.x_pitch);
  uint4* const grad = shared.take<uint4>(kPatchTiles * 16 * cuts.grad_pitch);
  uint4* const middle = shared.take<uint4>(kPixels * cuts.middle_pitch);
  uint4* const weights = shared.take<uint4>(8 * cuts.grad * cuts.middle_pitch);
  float* const d_dw = shared.take<float>(kTaps * p.channels);

  const int thread = static_cast<int>(threadIdx.x), warp = warp_id(), lane = lane_id();
  const int net = static_cast<int>(blockIdx.x) % p.nets, worker = static_cast<int>(blockIdx.x) / p.nets;
  const int out_channels = p.out_channels[net], steps = divided(out_channels, 16), groups = cuts.wide / 4;
  const bool through = p.d_dw[net] != nullptr;  // or a dx is wanted: then e is needed

  wait_for_previous_kernel();
  for (int i = thread; i < kTaps * cuts.x; i += kThreads)
    begin_copy16(taps + 8 * i, static_cast<const T*>(p.dw_weight[net]) + 8 * i, true);
  for (int i = thread; i < 16 * steps * cuts.wide; i += kThreads) {
    const int o = i / cuts.wide, v = i % cuts.wide;
    const bool exists = o < out_channels && v < cuts.x;
    begin_copy16(weights + o * cuts.middle_pitch + v,
                 static_cast<const T*>(p.pw_weight[net]) + (exists ? o * p.channels + 8 * v : 0), exists);
  }
  end_copies();
  // What no tile writes and operands have in them.
  for (int i = thread; i < kPixels * cuts.middle_pitch; i += kThreads) middle[i] = uint4{};
  for (int i = thread; i < kPatchTiles * 16 * cuts.grad_pitch; i += kThreads) grad[i] = uint4{};
  for (int i = thread; i < kTaps * p.channels; i += kThreads) d_dw[i] = 0.0f;
  __syncthreads();

  // Visits this thread's vectors of `pixels`: f(pixel, vector).
  const auto each_vector = [&](int pixels, int vectors, auto&& f) {
    EFFDET_NO_UNROLL
    for (int v = thread % kSliceVectors; v < vectors; v += kSliceVectors) {
      EFFDET_NO_UNROLL
      for (int pixel = thread / kSliceVectors; pixel < pixels; pixel += kThreads / kSliceVectors) f(pixel, v);
    }
  };
  int at = 0, image = 0, top = 0, left = 0;  // of the tile
  const auto begin_tile = [&](int number) {
    while (at + 1 < p.count && number >= p.levels[at + 1].first) ++at;
    const SeparableGradientLevel& level = p.levels[at];
    const int of_level = number - level.first, tile = of_level % level.tiles;
    image = of_level / level.tiles;
    top = tile / level.across * kRows;
    left = tile % level.across * kTileWidth;
    const auto copy = [&](uint4* patch, int pitch, const Map& map, int vectors, int existing) {
      const T* const from = static_cast<const T*>(map.data) + image * map.batch_stride;
      const int row_stride = static_cast<int>(map.row_stride), pixel_stride = static_cast<int>(map.pixel_stride);
      each_vector(kPatchPixels, vectors, [&](int pixel, int v) {
        const int row = static_cast<int>(static_cast<unsigned>(pixel) / kPatchWidth);
        const int h = top - 1 + row, w = left - 1 + pixel - row * kPatchWidth;
        const bool exists = v < existing && within(h, level.height) && within(w, level.width);
        begin_copy16(patch + pixel * pitch + v, from + (exists ? h * row_stride + w * pixel_stride + 8 * v : 0),
                     exists);
      });
    };
    copy(x, cuts.x_pitch, level.x[net], cuts.x, cuts.x);
    copy(grad, cuts.grad_pitch, level.grad[net], 2 * steps, out_channels / 8);
    end_copies();
  };

  Products d_pw[kBlocks][4];
  EFFDET_UNROLL
  for (int i = 0; i < 4 * kBlocks; ++i) d_pw[i / 4][i % 4] = Products{};
  if (worker < cuts.tiles) begin_tile(worker);
  EFFDET_NO_UNROLL
  for (int number = worker; number < cuts.tiles; number += p.workers) {
    wait_for_copies<0>();
    __syncthreads();
    if (p.d_pw[net]) {
      for (int v = warp; v < cuts.x; v += kWarps)
        convolve<T, kRows>(x + v, cuts.x_pitch, taps + 8 * v * kTaps, middle + v, cuts.middle_pitch, kTileWidth);
      __syncthreads();
      EFFDET_UNROLL
      for (int block = 0; block < kBlocks; ++block) {
        const int number_of_block = warp + kWarps * block;
        if (number_of_block >= steps * groups) continue;
        add_outer<T>(d_pw[block], grad + (kPatchWidth + 1) * cuts.grad_pitch + number_of_block / groups * 2,
                     cuts.grad_pitch, middle + number_of_block % groups * 4, cuts.middle_pitch);
      }
      __syncthreads();
    }
    void* const dx = p.levels[at].dx[net];
    if (dx || through) {
      for (int i = warp; i < kPatchTiles; i += kWarps)
        multiply_in_place<T, kSteps>(grad + 16 * i * cuts.grad_pitch, cuts.grad_pitch, weights, cuts.middle_pitch,
                                     steps, groups, cuts.x);
      __syncthreads();
      for (int v = warp; v < cuts.x; v += kWarps) {
        if (dx)
          convolve<T, kRows, true>(grad + v, cuts.grad_pitch, taps + 8 * v * kTaps, middle + v, cuts.middle_pitch,
                                   kTileWidth);
        if (through) add_taps<T>(d_dw + 8 * v * kTaps, x + v, cuts.x_pitch, grad + v, cuts.grad_pitch);
      }
      __syncthreads();
    }
    const SeparableGradientLevel& level = p.levels[at];
    const int height = level.height, width = level.width, first_row = top, first_column = left;
    T* const to = static_cast<T*>(dx) + std::int64_t{image} * height * width * p.channels;
    if (number + p.workers < cuts.tiles) begin_tile(number + p.workers);
    if (dx) {
      each_vector(kPixels, cuts.x, [&](int pixel, int v) {
        const int h = first_row + pixel / kTileWidth, w = first_column + pixel % kTileWidth;
        if (h < height && w < width)
          store(to + ((h * width + w) * p.channels + 8 * v), middle[pixel * cuts.middle_pitch + v]);
      });
    }
  }
  let_next_kernel_start();
  if (p.d_pw[net]) {
    EFFDET_UNROLL
    for (int i = 0; i < 8 * kBlocks; ++i) {
      const int block = warp + kWarps * (i / 8), column = i / 2 % 4, half = i % 2;
      const int o = block / groups * 16 + half * 8 + lane / 4, c = block % groups * 32 + column * 8 + lane % 4 * 2;
      if (o >= out_channels || c >= p.channels) continue;
      const float (&sums)[4] = d_pw[i / 8][column].values;
      store(p.d_pw[net] + (std::int64_t{worker} * out_channels + o) * p.channels + c,
            float2{sums[2 * half], sums[2 * half + 1]});
    }
  }
  if (through) {
    __syncthreads();
    float* const to = p.d_dw[net] + std::int64_t{worker} * p.channels * kTaps;
    for (int i = thread; i < kTaps * p.channels; i += kThreads) to[i] = d_dw[i];
  }
}

template <typename T, int kSteps, int kGroups>
int launch_gradient(const SeparableGradientParams& p, const Cuts& cuts, void* stream) {
  Grid grid;
  grid.blocks = std::int64_t{p.workers} * p.nets;
  grid.threads = Shape<kSteps, kGroups>::kThreads;
  const int vectors =
      kPatchPixels * cuts.x_pitch + kPatchTiles * 16 * cuts.grad_pitch + (kPixels + 8 * cuts.grad) * cuts.middle_pitch;
  grid.shared_bytes = Shared::rounded(kTaps * p.channels * sizeof(T)) + std::size_t{16} * vectors +
                      Shared::rounded(kTaps * p.channels * sizeof(float));
  return launch(separable_conv_bwd_kernel<T, kSteps, kGroups>, grid, stream, p, cuts);
}

template <typename T>
int launch_gradient(const SeparableGradientParams& p, const Cuts& cuts, void* stream) {
  // D0's 64 channels, and what is less; the rest.
  if (cuts.grad <= 8 && cuts.wide <= 8) return launch_gradient<T, 4, 2>(p, cuts, stream);
  return launch_gradient<T, 8, 4>(p, cuts, stream);
}

}  // namespace

int separable_conv_gradient(const SeparableGradientParams& params, void* stream) {
  SeparableGradientParams p = params;
  Cuts cuts{};
  std::int64_t tiles = 0;
  for (int i = 0; i < p.count; ++i) {
    SeparableGradientLevel& level = p.levels[i];
    level.first = static_cast<int>(tiles);
    level.across = divided(level.width, kTileWidth);
    level.tiles = level.across * divided(level.height, kRows);
    tiles += p.batch * level.tiles;
    if (tiles > kMostBlocks - p.workers) return kBadSize;
  }
  const int widest = p.nets == 1 ? p.out_channels[0] : std::max(p.out_channels[0], p.out_channels[1]);
  cuts.tiles = static_cast<int>(tiles);
  cuts.x = p.channels / 8;
  cuts.x_pitch = cuts.x | 1;
  cuts.grad = 2 * divided(widest, 16);
  cuts.grad_pitch = std::max(cuts.x, cuts.grad) | 1;
  cuts.wide = 4 * divided(p.channels, 32);
  cuts.middle_pitch = cuts.wide | 1;
  if (p.dtype == kBFloat16) return launch_gradient<BFloat16>(p, cuts, stream);
  return launch_gradient<Float16>(p, cuts, stream);
}

}  // namespace effdet::cuda
