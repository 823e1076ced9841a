// What the CUDA kernels of pointwise_conv share: the vectors of a block, and how a map is cut into blocks.
#pragma once

#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/number.h"
#include "pointwise_conv/cuda.h"
#include "pointwise_conv/cuda_excite.h"

namespace effdet::cuda {

int pointwise_conv_float(const PointwiseParams& params, void* stream);  // of float32

// A block's arrays in shared memory for gates, null where there are none.
struct Gates {
  float *values, *hidden;
};
inline __host__ __device__ bool is_gated(const PointwiseParams& p) {
  return p.gate || p.excite.parts;
}
__device__ __forceinline__ Gates take_gates(const PointwiseParams& p, Shared& shared) {
  Gates gates{};
  if (is_gated(p)) gates.values = shared.take<float>(divided(p.in_channels, 16) * 16);
  if (p.excite.parts) gates.hidden = shared.take<float>(p.excite.reduced);
  return gates;
}
inline std::size_t bytes_of_gates(const PointwiseParams& p) {
  return (is_gated(p) ? divided(p.in_channels, 16) * 64 : 0) +
         (p.excite.parts ? Shared::rounded(p.excite.reduced * 4) : 0);
}

// Factors of the block's output channels, then summands; the gates of its image with zeros after the last.
template <typename T, int kOut, int kThreads>
__device__ __forceinline__ void load_vectors(const PointwiseParams& p, std::int64_t image, int first_out, float* affine,
                                             const Gates& gates) {
  for (int i = static_cast<int>(threadIdx.x); i < kOut; i += kThreads) {
    const int out = first_out + i;
    affine[i] = p.scale && out < p.out_channels ? p.scale[out] : 1.0f;
    affine[kOut + i] = p.shift && out < p.out_channels ? p.shift[out] : 0.0f;
  }
  if (p.excite.parts) {
    if (p.excite.dtype == kFloat32) {
      excite<float, kThreads>(p.excite, image, p.in_channels, gates.values, gates.hidden);
    } else {
      excite<T, kThreads>(p.excite, image, p.in_channels, gates.values, gates.hidden);
    }
  } else if (p.gate) {
    const std::int64_t start = image * p.in_channels;
    for (int i = static_cast<int>(threadIdx.x); i < divided(p.in_channels, 16) * 16; i += kThreads) {
      float gate = 0.0f;
      if (i < p.in_channels) {
        gate = p.gate_dtype == kFloat32 ? static_cast<const float*>(p.gate)[start + i]
                                        : widen(static_cast<const T*>(p.gate)[start + i]);
      }
      gates.values[i] = gate;
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
  grid.shared_bytes = S::kStages * S::kStage * 16 + Shared::rounded(2 * S::kOut * 4) + bytes_of_gates(p) + more_bytes;
  return launch(kernel, grid, stream, p, static_cast<int>(cuts.tiles), static_cast<int>(cuts.blocks));
}

}  // namespace effdet::cuda
