// What the CUDA kernels of pointwise_conv share: the vectors of a block, and how a map is cut into blocks.
#pragma once

#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/number.h"
#include "pointwise_conv/cuda.h"

namespace effdet::cuda {

int pointwise_conv_float(const PointwiseParams& params, void* stream);  // of float32

// Factors of the block's output channels, then summands, then the gates of its image with zeros after the last.
template <typename T, int kOut, int kThreads>
__device__ __forceinline__ void load_vectors(const PointwiseParams& p, std::int64_t image, int first_out, float* affine,
                                             float* gates) {
  for (int i = static_cast<int>(threadIdx.x); i < kOut; i += kThreads) {
    const int out = first_out + i;
    affine[i] = p.scale && out < p.out_channels ? p.scale[out] : 1.0f;
    affine[kOut + i] = p.shift && out < p.out_channels ? p.shift[out] : 0.0f;
  }
  if (p.gate) {
    const std::int64_t start = image * p.in_channels;
    for (int i = static_cast<int>(threadIdx.x); i < divided(p.in_channels, 16) * 16; i += kThreads) {
      float gate = 0.0f;
      if (i < p.in_channels) {
        gate = p.gate_dtype == kFloat32 ? static_cast<const float*>(p.gate)[start + i]
                                        : widen(static_cast<const T*>(p.gate)[start + i]);
      }
      gates[i] = gate;
    }
  }
}

struct Cuts {
  std::int64_t tiles, blocks, all;
};
template <typename S>
Cuts cuts_of(const PointwiseParams& p) {
  const std::int64_t tiles = divided(p.x.height * p.x.width, std::int64_t{S::kPixels});
  const std::int64_t blocks = divided(std::int64_t{p.out_channels}, std::int64_t{S::kOut});
  return {tiles, blocks, p.batch * tiles * blocks};
}

template <typename S, typename Kernel>
int launch_cut(const PointwiseParams& p, std::size_t more_bytes, Kernel kernel, void* stream) {
  const Cuts cuts = cuts_of<S>(p);
  Grid grid;
  grid.blocks = cuts.all;
  grid.threads = S::kThreads;
  grid.shared_bytes = S::kStages * S::kStage * 16 + Shared::rounded(2 * S::kOut * 4) + more_bytes;
  if (p.gate) grid.shared_bytes += divided(p.in_channels, 16) * 64;
  return launch(kernel, grid, stream, p, static_cast<int>(cuts.tiles), static_cast<int>(cuts.blocks));
}

}  // namespace effdet::cuda
