// pointwise_conv, forward, of float32 maps: multiply-adds on slices of the input channels that asynchronous copies
// bring into a ring in shared memory.
#include "cuda/activation.h"
#include "pointwise_conv/cuda_block.h"

namespace effdet::cuda {
namespace {

// float32: a thread makes kRows pixels, 8 apart, of kColumns output channels, 16 apart.
template <int kRows_, int kColumns_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_;
  static constexpr int kThreads = 128, kStages = 3;
  static constexpr int kSlice = 16;  // input channels
  static constexpr int kChunks = kSlice / 4, kLines = kThreads / kChunks;
  static constexpr int kPixels = 8 * kRows, kOut = 16 * kColumns;
  static constexpr int kPitch = kChunks | 1;  // in 16 bytes
  static constexpr int kStage = (kPixels + kOut) * kPitch;
};

template <typename S>
__global__ void __launch_bounds__(S::kThreads, 512 / S::kThreads)
    pointwise_conv_fwd_float_kernel(const PointwiseParams p, const int tiles, const int blocks) {
  Shared shared;
  float4* const ring = shared.take<float4>(S::kStages * S::kStage);
  float* const affine = shared.take<float>(2 * S::kOut);
  const Gates gates = take_gates(p, shared);
  const int tile = static_cast<int>(blockIdx.x) / blocks;
  const std::int64_t image = tile / tiles;
  const int pixels = static_cast<int>(p.x.height * p.x.width), width = static_cast<int>(p.x.width);
  const int first = tile % tiles * S::kPixels;
  const int first_out = static_cast<int>(blockIdx.x) % blocks * S::kOut;
  const int thread = static_cast<int>(threadIdx.x), chunk = thread % S::kChunks;
  const float* const x = static_cast<const float*>(p.x.data) + image * p.x.batch_stride;
  const float* const weight = static_cast<const float*>(p.weight);
  const auto begin_stage = [&](int slice) {
    float4* const stage = ring + slice % S::kStages * S::kStage + chunk;
    const int channel = slice * S::kSlice + chunk * 4;
    for (int row = thread / S::kChunks; row < S::kPixels; row += S::kLines) {
      const int pixel = first + row;
      const bool exists = channel < p.in_channels && pixel < pixels;
      const std::int64_t at = pixel / width * p.x.row_stride + pixel % width * p.x.pixel_stride + channel;
      begin_copy16(stage + row * S::kPitch, x + (exists ? at : 0), exists);
    }
    for (int row = thread / S::kChunks; row < S::kOut; row += S::kLines) {
      const bool exists = channel < p.in_channels && first_out + row < p.out_channels;
      const std::int64_t at = static_cast<std::int64_t>(first_out + row) * p.in_channels + channel;
      begin_copy16(stage + (S::kPixels + row) * S::kPitch, weight + (exists ? at : 0), exists);
    }
  };

  wait_for_previous_kernel();
  const int slices = divided(p.in_channels, S::kSlice);
  EFFDET_UNROLL
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < slices) begin_stage(i);
    end_copies();
  }
  load_vectors<float, S::kOut, S::kThreads>(p, image, first_out, affine, gates);
  const int row = thread / 16, column = thread % 16;
  float sums[S::kRows][S::kColumns];
  EFFDET_UNROLL
  for (int i = 0; i < S::kRows; ++i) EFFDET_UNROLL
  for (int j = 0; j < S::kColumns; ++j) sums[i][j] = 0.0f;
  EFFDET_NO_UNROLL
  for (int slice = 0; slice < slices; ++slice) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();
    if (slice + S::kStages - 1 < slices) begin_stage(slice + S::kStages - 1);
    end_copies();
    const float4* const stage = ring + slice % S::kStages * S::kStage;
    EFFDET_UNROLL
    for (int step = 0; step < S::kChunks; ++step) {
      float4 w[S::kColumns];
      EFFDET_UNROLL
      for (int j = 0; j < S::kColumns; ++j) w[j] = stage[(S::kPixels + column + 16 * j) * S::kPitch + step];
      if (gates.values) {
        const float4 gate = load<float4>(gates.values + slice * S::kSlice + step * 4);
        EFFDET_UNROLL
        for (int j = 0; j < S::kColumns; ++j)
          w[j] = {w[j].x * gate.x, w[j].y * gate.y, w[j].z * gate.z, w[j].w * gate.w};
      }
      EFFDET_UNROLL
      for (int i = 0; i < S::kRows; ++i) {
        const float4 v = stage[(row + 8 * i) * S::kPitch + step];
        EFFDET_UNROLL
        for (int j = 0; j < S::kColumns; ++j) {
          sums[i][j] += v.x * w[j].x;
          sums[i][j] += v.y * w[j].y;
          sums[i][j] += v.z * w[j].z;
          sums[i][j] += v.w * w[j].w;
        }
      }
    }
  }
  wait_for_copies<0>();  // groups without copies are left
  let_next_kernel_start();
  const float* const residual = static_cast<const float*>(p.residual.data) + image * p.residual.batch_stride;
  float* const y = static_cast<float*>(p.y) + image * pixels * p.out_channels;
  EFFDET_UNROLL
  for (int i = 0; i < S::kRows; ++i) {
    EFFDET_UNROLL
    for (int j = 0; j < S::kColumns; ++j)
      sums[i][j] = sums[i][j] * affine[column + 16 * j] + affine[S::kOut + column + 16 * j];
    activate<kAny>(sums[i], p.act);
    const int pixel = first + row + 8 * i;
    const std::int64_t at = pixel / width * p.residual.row_stride + pixel % width * p.residual.pixel_stride;
    EFFDET_UNROLL
    for (int j = 0; j < S::kColumns; ++j) {
      const int out = first_out + column + 16 * j;
      if (pixel < pixels && out < p.out_channels) {
        const float more = p.residual.data ? residual[at + out] : 0.0f;
        y[static_cast<std::int64_t>(pixel) * p.out_channels + out] = sums[i][j] + more;
      }
    }
  }
}

}  // namespace

int pointwise_conv_float(const PointwiseParams& p, void* stream) {
  using Large = Tile<8, 4>;
  using Small = Tile<4, 2>;
  if (cuts_of<Large>(p).all < p.multiprocessors)
    return launch_cut<Small>(p, 0, pointwise_conv_fwd_float_kernel<Small>, stream);
  return launch_cut<Large>(p, 0, pointwise_conv_fwd_float_kernel<Large>, stream);
}

}  // namespace effdet::cuda
