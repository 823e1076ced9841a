// depthwise_conv, forward. 16-bit maps go through matrix units (matrix.h), from a ring of rows in shared memory that
// asynchronous copies fill. What the design costs, and what others would, is in
// effdet_kernels/ops/depthwise_conv/README.md.
#include "cuda/activation.h"
#include "cuda/launch.h"
#include "depthwise_conv/matrix.h"
#include "depthwise_conv/params.h"

namespace effdet::cuda {
namespace {

template <typename S>
std::size_t shared_bytes(int granules) {
  return std::size_t{S::kStages} * S::kRows * S::kPixels * padded(granules) * 16;
}

// The sums of the output pixels (row, column) and (row, column + 8), two channels each, tap by tap, from global memory.
template <typename T>
__device__ void sum_taps(float (&sums)[4], const DepthwiseParams& p, std::int64_t image, int row, int column,
                         int channel) {
  const T* x = static_cast<const T*>(p.x.data) + image * p.x.batch_stride + channel;
  const int taps = p.kernel * p.kernel;
  const T* weight = static_cast<const T*>(p.weight) + static_cast<std::int64_t>(channel) * taps;
  EFFDET_UNROLL
  for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
  EFFDET_NO_UNROLL
  for (int tap = 0; tap < taps; ++tap) {
    const int h = row * p.stride - p.top + tap / p.kernel, first = column * p.stride - p.left + tap % p.kernel;
    EFFDET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int w = first + i / 2 * 8 * p.stride;
      const bool exists = h >= 0 && h < p.x.height && w >= 0 && w < p.x.width;
      const T* at = x + h * p.x.row_stride + w * p.x.pixel_stride + i % 2;
      sums[i] += (exists ? widen(*at) : 0.0f) * widen(weight[i % 2 * taps + tap]);
    }
  }
}

template <typename T, int kKernel, int kStride, int kAct>
__global__ void __launch_bounds__(kWarp* DepthwiseShape<kKernel, kStride>::kGranules, kKernel == 3 ? 2 : 3)
    depthwise_conv_fwd_matrix_kernel(const DepthwiseParams p, const DepthwiseCuts cuts) {
  using S = DepthwiseShape<kKernel, kStride>;
  const int granules = cuts.channels / kGranule;
  const int pitch = padded(granules);  // in 16 bytes
  Shared shared;
  uint4* const ring = shared.take<uint4>(S::kStages * S::kRows * S::kPixels * pitch);

  const int part = static_cast<int>(blockIdx.x / cuts.blocks);
  const int first_channel = static_cast<int>(blockIdx.x % cuts.blocks) * cuts.channels;
  const std::int64_t image = part / (cuts.tiles * cuts.segments);
  const int first_row = part / cuts.tiles % cuts.segments * p.rows;
  const int first_column = part % cuts.tiles * S::kColumns;
  const int rows = min(p.rows, p.out_height - first_row);
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int channel = first_channel + warp_id() * kGranule;  // the warp's first
  const bool works = channel < p.channels;

  // Offsets in an image have 32 bits.
  const int x_row = static_cast<int>(p.x.row_stride), x_pixel = static_cast<int>(p.x.pixel_stride);
  const int height = static_cast<int>(p.x.height), width = static_cast<int>(p.x.width);
  // Where this thread copies: one granule of pixels that are 32 apart.
  const int copied_granule = static_cast<int>(threadIdx.x) % granules;
  const int copied_pixel = static_cast<int>(threadIdx.x) / granules;
  const bool copies = first_channel + copied_granule * kGranule < p.channels;
  const T* const source =
      static_cast<const T*>(p.x.data) + image * p.x.batch_stride + first_channel + copied_granule * kGranule;
  const int top = first_row * kStride - p.top, left = first_column * kStride - p.left;
  const auto begin_stage = [&](int stage) {
    uint4* const to = ring + stage % S::kStages * S::kRows * S::kPixels * pitch + copied_granule;
    for (int i = copied_pixel; i < S::kRows * S::kPixels; i += kWarp) {
      const int h = top + stage * S::kRows + i / S::kPixels, w = left + i % S::kPixels;
      const bool exists = copies && h >= 0 && h < height && w >= 0 && w < width;
      const int at = exists ? h * x_row + w * x_pixel : 0;
      begin_copy16(to + i * pitch, source + at, exists);
    }
    end_copies();
  };

  wait_for_previous_kernel();
  begin_stage(0);

  MatrixWalk<T, kKernel, kStride, kAct> walk;
  const int mine = channel + 2 * t;  // the first of this thread's two channels
  walk.begin(static_cast<const T*>(p.weight) + static_cast<std::int64_t>(channel + g) * kKernel * kKernel,
             p.scale ? p.scale + mine : nullptr, p.shift ? p.shift + mine : nullptr, works);
  T* const y = static_cast<T*>(p.y) + image * p.out_height * p.out_width * p.channels + mine;
  const OutputRows<T> out{y, first_row, rows, first_column, p.out_width, p.channels, p.act, works};
  const int steps = rows + S::kLive - 1;
  const int stages = divided(steps, S::kLive);
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      begin_stage(stage + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    walk.stage(ring + stage % S::kStages * S::kRows * S::kPixels * pitch + warp_id(), pitch, stage * S::kLive, steps,
               out, [&](float (&z)[4], int row, int column) { sum_taps<T>(z, p, image, row, column, mine); });
    __syncthreads();  // before the next copies into what was read
  }
  let_next_kernel_start();
  if (p.sums) walk.store_totals(p.sums + static_cast<std::int64_t>(part) * p.channels + mine, works);
}

// float32: a thread makes four channels of kColumns output pixels, walking down, the weights in shared memory.
template <int kKernel, int kStride>
struct Taps {
  static constexpr int kColumns = kStride == 1 ? 4 : 2;
  static constexpr int kLive = divided(kKernel, kStride);
  static constexpr int kPixels = (kColumns - 1) * kStride + kKernel;
  static constexpr int kThreads = 128;
  static constexpr int kChannels = 32;                            // of a block
  static constexpr int kVectors = kChannels / 4;                  // a thread each
  static constexpr int kAcross = kThreads / kVectors * kColumns;  // output columns of a block
};

template <int kKernel, int kStride>
__global__ void __launch_bounds__(128)
    depthwise_conv_fwd_taps_kernel(const DepthwiseParams p, const DepthwiseCuts cuts) {
  using S = Taps<kKernel, kStride>;
  Shared shared;
  float* const weights = shared.take<float>(kKernel * kKernel * S::kChannels);
  float* const totals = shared.take<float>(S::kThreads * 4);
  const int part = static_cast<int>(blockIdx.x / cuts.blocks);
  const int first_channel = static_cast<int>(blockIdx.x % cuts.blocks) * S::kChannels;
  const std::int64_t image = part / (cuts.tiles * cuts.segments);
  const int first_row = part / cuts.tiles % cuts.segments * p.rows;
  const int rows = min(p.rows, p.out_height - first_row);
  const int vector = static_cast<int>(threadIdx.x) % S::kVectors;
  const int channel = first_channel + 4 * vector;
  const int column = part % cuts.tiles * S::kAcross + static_cast<int>(threadIdx.x) / S::kVectors * S::kColumns;
  const bool works = channel < p.channels && column < p.out_width;

  wait_for_previous_kernel();
  const float* const weight = static_cast<const float*>(p.weight);
  for (int i = static_cast<int>(threadIdx.x); i < kKernel * kKernel * S::kChannels; i += S::kThreads) {
    const int c = first_channel + i % S::kChannels, tap = i / S::kChannels;
    weights[i] = c < p.channels ? weight[static_cast<std::int64_t>(c) * kKernel * kKernel + tap] : 0.0f;
  }
  __syncthreads();
  float total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (works) {
    float scale[4] = {1.0f, 1.0f, 1.0f, 1.0f}, shift[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    EFFDET_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (p.scale) scale[i] = p.scale[channel + i];
      if (p.shift) shift[i] = p.shift[channel + i];
    }
    const float* const x = static_cast<const float*>(p.x.data) + image * p.x.batch_stride + channel;
    float* const y = static_cast<float*>(p.y) + image * p.out_height * p.out_width * p.channels + channel;
    const int left = column * kStride - p.left;
    float sums[S::kLive][S::kColumns][4];
    EFFDET_UNROLL
    for (int i = 0; i < S::kLive; ++i) EFFDET_UNROLL
    for (int c = 0; c < S::kColumns; ++c) EFFDET_UNROLL
    for (int k = 0; k < 4; ++k) sums[i][c][k] = 0.0f;
    const int steps = rows + S::kLive - 1;
    for (int first_step = 0; first_step < steps; first_step += S::kLive) {
      EFFDET_UNROLL
      for (int phase = 0; phase < S::kLive; ++phase) {
        const int step = first_step + phase;
        if (step < steps) {
          EFFDET_UNROLL
          for (int c = 0; c < S::kColumns; ++c) EFFDET_UNROLL
          for (int k = 0; k < 4; ++k) sums[phase][c][k] = 0.0f;
          EFFDET_UNROLL
          for (int q = 0; q < kStride; ++q) {
            const int h = (first_row + step) * kStride - p.top + q;
            const bool exists = h >= 0 && h < p.x.height;
            float values[S::kPixels][4];
            EFFDET_UNROLL
            for (int j = 0; j < S::kPixels; ++j) {
              const int w = left + j;
              float4 pixel{0.0f, 0.0f, 0.0f, 0.0f};
              if (exists && w >= 0 && w < p.x.width)
                pixel = load<float4>(x + h * p.x.row_stride + w * p.x.pixel_stride);
              values[j][0] = pixel.x;
              values[j][1] = pixel.y;
              values[j][2] = pixel.z;
              values[j][3] = pixel.w;
            }
            EFFDET_UNROLL
            for (int d = 0; d < S::kLive; ++d) {
              const int i = d * kStride + q;
              if (i < kKernel) {
                EFFDET_UNROLL
                for (int j = 0; j < kKernel; ++j) {
                  const float4 tap = load<float4>(weights + (i * kKernel + j) * S::kChannels + 4 * vector);
                  const float four[4] = {tap.x, tap.y, tap.z, tap.w};
                  EFFDET_UNROLL
                  for (int c = 0; c < S::kColumns; ++c) EFFDET_UNROLL
                  for (int k = 0; k < 4; ++k)
                    sums[(phase - d + S::kLive) % S::kLive][c][k] += four[k] * values[c * kStride + j][k];
                }
              }
            }
          }
          const int row = first_row + step - (S::kLive - 1);
          if (row >= first_row && row < first_row + rows) {
            EFFDET_UNROLL
            for (int c = 0; c < S::kColumns; ++c) {
              float values[4];
              EFFDET_UNROLL
              for (int k = 0; k < 4; ++k) values[k] = sums[(phase + 1) % S::kLive][c][k] * scale[k] + shift[k];
              activate<kAny>(values, p.act);
              if (column + c < p.out_width) {
                const std::int64_t at = (static_cast<std::int64_t>(row) * p.out_width + column + c) * p.channels;
                store(y + at, float4{values[0], values[1], values[2], values[3]});
                EFFDET_UNROLL
                for (int k = 0; k < 4; ++k) total[k] += values[k];
              }
            }
          }
        }
      }
    }
  }
  let_next_kernel_start();
  if (p.sums) {
    EFFDET_UNROLL
    for (int k = 0; k < 4; ++k) totals[static_cast<int>(threadIdx.x) * 4 + k] = total[k];
    __syncthreads();
    const int c = static_cast<int>(threadIdx.x);
    if (c < S::kChannels && first_channel + c < p.channels) {
      float sum = 0.0f;
      for (int i = 0; i < S::kThreads / S::kVectors; ++i) sum += totals[(i * S::kVectors + c / 4) * 4 + c % 4];
      p.sums[static_cast<std::int64_t>(part) * p.channels + first_channel + c] = sum;
    }
  }
}

template <int kKernel, int kStride>
int launch_of(const DepthwiseParams& p, void* stream) {
  const DepthwiseCuts cuts = depthwise_cuts(p);
  Grid grid;
  grid.blocks = p.batch * cuts.segments * cuts.tiles * cuts.blocks;
  if (p.dtype == kFloat32) {
    using S = Taps<kKernel, kStride>;
    grid.threads = S::kThreads;
    grid.shared_bytes = Shared::rounded(kKernel * kKernel * S::kChannels * 4) + Shared::rounded(S::kThreads * 16);
    return launch(depthwise_conv_fwd_taps_kernel<kKernel, kStride>, grid, stream, p, cuts);
  }
  const int granules = cuts.channels / kGranule;
  grid.threads = kWarp * granules;
  grid.shared_bytes = shared_bytes<DepthwiseShape<kKernel, kStride>>(granules);
  const bool swish = p.act == kSwish;
  if (p.dtype == kBFloat16)
    return launch(swish ? depthwise_conv_fwd_matrix_kernel<BFloat16, kKernel, kStride, kSwish>
                        : depthwise_conv_fwd_matrix_kernel<BFloat16, kKernel, kStride, kAny>,
                  grid, stream, p, cuts);
  return launch(swish ? depthwise_conv_fwd_matrix_kernel<Float16, kKernel, kStride, kSwish>
                      : depthwise_conv_fwd_matrix_kernel<Float16, kKernel, kStride, kAny>,
                grid, stream, p, cuts);
}

}  // namespace

DepthwiseCuts depthwise_cuts(const DepthwiseParams& p) {
  DepthwiseCuts cuts{};
  cuts.segments = divided(p.out_height, p.rows);
  if (p.dtype == kFloat32) {
    cuts.channels = Taps<3, 1>::kChannels;
    cuts.tiles = divided(p.out_width, p.stride == 1 ? Taps<3, 1>::kAcross : Taps<3, 2>::kAcross);
    cuts.blocks = divided(p.channels, cuts.channels);
    return cuts;
  }
  const int granules = p.channels / kGranule,
            most = p.kernel == 3 ? DepthwiseShape<3, 1>::kGranules : DepthwiseShape<5, 1>::kGranules;
  cuts.blocks = divided(granules, most);
  cuts.channels = divided(granules, cuts.blocks) * kGranule;
  cuts.tiles = divided(p.out_width, p.stride == 1 ? DepthwiseShape<3, 1>::kColumns : DepthwiseShape<3, 2>::kColumns);
  return cuts;
}

int depthwise_conv(const DepthwiseParams& p, void* stream) {
  if (p.kernel == 3) return p.stride == 1 ? launch_of<3, 1>(p, stream) : launch_of<3, 2>(p, stream);
  return p.stride == 1 ? launch_of<5, 1>(p, stream) : launch_of<5, 2>(p, stream);
}

}  // namespace effdet::cuda
