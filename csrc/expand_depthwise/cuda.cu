// expand_depthwise, forward, of 16-bit maps, without storing the expanded map. A block walks down some columns of an
// image and makes up to 64 of the expanded channels: a few rows of x come into shared memory, their expansion goes to
// shared memory next to them, and from there each warp convolves eight channels (depthwise_conv/matrix.h). What the
// design costs is in effdet_kernels/ops/expand_depthwise/README.md.
#include "cuda/launch.h"
#include "depthwise_conv/matrix.h"
#include "expand_depthwise/cuda.h"

namespace effdet::cuda {
namespace {

// What is fixed when a kernel is compiled.
template <int kKernel, int kStride>
struct Stage {
  using S = DepthwiseShape<kKernel, kStride>;
  static constexpr int kPixels = S::kRows * S::kPixels;  // of x, and of its expansion
  static constexpr int kTiles = divided(kPixels, 16);    // of 16 pixels; every other one is a warp's
  static constexpr int kMine = divided(kTiles, 2);
  static constexpr int kAtOnce = divided(kMine, divided(kMine, 3));  // tiles that a warp expands at once
};

// Chunks of 8 in a pixel of x, or in a row of the weights, as matrix units take them.
__host__ __device__ constexpr int chunks_of(int in_channels) {
  return divided(in_channels, 16) * 2;
}

template <typename G>
std::size_t shared_bytes(const ExpandDepthwiseParams& p, int channels) {
  const std::size_t pixels = 16 * G::kTiles, pitch = padded(chunks_of(p.in_channels));
  return 16 * ((pixels + channels) * pitch + pixels * padded(channels / kGranule)) + Shared::rounded(2 * channels * 4);
}

// An element of the expanded map, from global memory.
template <typename T, int kAct>
__device__ __forceinline__ float expanded(const ExpandDepthwiseParams& p, std::int64_t image, int h, int w,
                                          int channel) {
  if (h < 0 || h >= p.x.height || w < 0 || w >= p.x.width) return 0.0f;
  const T* x = static_cast<const T*>(p.x.data) + image * p.x.batch_stride + h * p.x.row_stride + w * p.x.pixel_stride;
  const T* weight = static_cast<const T*>(p.expand_weight) + static_cast<std::int64_t>(channel) * p.in_channels;
  float sum = 0.0f;
  EFFDET_NO_UNROLL
  for (int i = 0; i < p.in_channels; ++i) sum += widen(x[i]) * widen(weight[i]);
  float value[2] = {sum * p.expand_scale[channel] + p.expand_shift[channel], 0.0f};
  activate_pairs<kAct>(value, p.act);
  return widen(narrow<T>(value[0]));
}

// The sums of the output pixels (row, column) and (row, column + 8), two channels each, tap by tap.
template <typename T, int kAct>
__device__ __forceinline__ void sum_expanded_taps(float (&sums)[4], const ExpandDepthwiseParams& p, std::int64_t image,
                                                  int row, int column, int channel) {
  const int taps = p.kernel * p.kernel;
  const T* weight = static_cast<const T*>(p.weight) + static_cast<std::int64_t>(channel) * taps;
  EFFDET_NO_UNROLL
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;
    EFFDET_NO_UNROLL
    for (int tap = 0; tap < taps; ++tap) {
      const int h = row * p.stride - p.top + tap / p.kernel;
      const int w = (column + i / 2 * 8) * p.stride - p.left + tap % p.kernel;
      sum += expanded<T, kAct>(p, image, h, w, channel + i % 2) * widen(weight[i % 2 * taps + tap]);
    }
    EFFDET_UNROLL
    for (int k = 0; k < 4; ++k) sums[k] = k == i ? sum : sums[k];  // an index unknown to the compiler is in memory
  }
}

template <typename T, int kKernel, int kStride, int kAct>
__global__ void __launch_bounds__(kWarp* DepthwiseShape<kKernel, kStride>::kGranules, kKernel == 3 ? 2 : 3)
    expand_depthwise_fwd_kernel(const ExpandDepthwiseParams p, const DepthwiseCuts cuts) {
  using S = DepthwiseShape<kKernel, kStride>;
  using G = Stage<kKernel, kStride>;
  const int granules = cuts.channels / kGranule;                                                      // even
  const int chunks = chunks_of(p.in_channels), x_pitch = padded(chunks), e_pitch = padded(granules);  // in 16 bytes
  Shared shared;
  uint4* const x_tile = shared.take<uint4>(16 * G::kTiles * x_pitch);
  uint4* const expand_weights = shared.take<uint4>(cuts.channels * x_pitch);
  uint4* const e_tile = shared.take<uint4>(16 * G::kTiles * e_pitch);
  float* const affine = shared.take<float>(2 * cuts.channels);

  const int part = static_cast<int>(blockIdx.x / cuts.blocks);
  const int first_channel = static_cast<int>(blockIdx.x % cuts.blocks) * cuts.channels;
  const std::int64_t image = part / (cuts.tiles * cuts.segments);
  const int first_row = part / cuts.tiles % cuts.segments * p.rows;
  const int first_column = part % cuts.tiles * S::kColumns;
  const int rows = min(p.rows, p.out_height - first_row);
  const int thread = static_cast<int>(threadIdx.x), threads = kWarp * granules;
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  const int steps = rows + S::kLive - 1, stages = divided(steps, S::kLive);

  // Where this thread copies: one chunk of every so many pixels.
  int bits = 1;
  while (1 << bits < chunks) ++bits;
  const int chunk = thread & ((1 << bits) - 1);
  const bool copies = chunk < chunks, filled = chunk * 8 < p.in_channels;
  const int x_row = static_cast<int>(p.x.row_stride), x_pixel = static_cast<int>(p.x.pixel_stride);
  const int height = static_cast<int>(p.x.height), width = static_cast<int>(p.x.width);
  const int top = first_row * kStride - p.top, left = first_column * kStride - p.left;
  const T* const x = static_cast<const T*>(p.x.data) + image * p.x.batch_stride;
  const auto begin_stage = [&](int stage) {
    for (int i = thread >> bits; copies && i < G::kPixels; i += threads >> bits) {
      const int h = top + stage * S::kRows + i / S::kPixels, w = left + i % S::kPixels;
      const bool exists = filled && h >= 0 && h < height && w >= 0 && w < width;
      begin_copy16(x_tile + i * x_pitch + chunk, x + (exists ? h * x_row + w * x_pixel + chunk * 8 : 0), exists);
    }
    end_copies();
  };

  wait_for_previous_kernel();
  const T* const expand_weight = static_cast<const T*>(p.expand_weight);
  for (int i = thread >> bits; copies && i < cuts.channels; i += threads >> bits) {
    const bool exists = filled && first_channel + i < p.channels;
    const int at = (first_channel + i) * p.in_channels + chunk * 8;
    begin_copy16(expand_weights + i * x_pitch + chunk, expand_weight + (exists ? at : 0), exists);
  }
  begin_stage(0);
  for (int i = thread; i < cuts.channels; i += threads) {
    const bool exists = first_channel + i < p.channels;
    affine[i] = exists ? p.expand_scale[first_channel + i] : 0.0f;
    affine[cuts.channels + i] = exists ? p.expand_shift[first_channel + i] : 0.0f;
  }
  const int channel = first_channel + warp_id() * kGranule, mine = channel + 2 * t;
  const bool works = channel < p.channels;
  MatrixWalk<T, kKernel, kStride, kAct> walk;
  walk.begin(static_cast<const T*>(p.weight) + static_cast<std::int64_t>(channel + g) * kKernel * kKernel,
             p.scale ? p.scale + mine : nullptr, p.shift ? p.shift + mine : nullptr, works);
  T* const y = static_cast<T*>(p.y) + image * p.out_height * p.out_width * p.channels + mine;
  const OutputRows<T> out{y, first_row, rows, first_column, p.out_width, p.channels, p.last_act, works};

  // Of the expansion a warp makes 16 channels, in every other tile.
  const int pair = warp_id() % (granules / 2), half = warp_id() / (granules / 2);
  const int first_of_pair = pair * 16 + 2 * t;
  const uint4* const weight_rows = expand_weights + (pair * 16 + lane / 16 * 8 + lane % 8) * x_pitch + lane / 8 % 2;
  unsigned* const e_words = reinterpret_cast<unsigned*>(e_tile + pair * 2) + t;
  const bool columns_exist = left >= 0 && left + S::kPixels <= width;
  EFFDET_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    wait_for_copies<0>();
    __syncthreads();  // the rows of x are there, and those of their expansion before were read by all
    const int tiles = divided(min(S::kRows, (steps - stage * S::kLive) * kStride) * S::kPixels, 16);
    const int first_h = top + stage * S::kRows;
    const bool all_exist = columns_exist && first_h >= 0 && first_h + S::kRows <= height;
    EFFDET_NO_UNROLL
    for (int first_tile = half; first_tile < tiles; first_tile += 2 * G::kAtOnce) {
      Products sums[G::kAtOnce][2];
      const uint4* rows_of[G::kAtOnce];  // of a tile; where there are no more, of the last one
      EFFDET_UNROLL
      for (int m = 0; m < G::kAtOnce; ++m) {
        const int row = min(first_tile + 2 * m, G::kTiles - 1) * 16 + lane % 16;
        rows_of[m] = x_tile + row * x_pitch + lane / 16;
      }
      const auto multiply = [&](int k, auto first) {
        const LeftOperand four = load_matrices<false>(weight_rows + k);
        EFFDET_UNROLL
        for (int m = 0; m < G::kAtOnce; ++m) {
          const LeftOperand pixels = load_matrices<false>(rows_of[m] + k);
          EFFDET_UNROLL
          for (int n = 0; n < 2; ++n) {
            if constexpr (decltype(first)::value) sums[m][n] = Products{};
            multiply_add<T>(sums[m][n], pixels, RightOperand{{four.words[2 * n], four.words[2 * n + 1]}});
          }
        }
      };
      multiply(0, std::true_type{});
      EFFDET_NO_UNROLL
      for (int k = 2; k < chunks; k += 2) multiply(k, std::false_type{});
      float2 scales[2], shifts[2];  // of two granules
      EFFDET_UNROLL
      for (int n = 0; n < 2; ++n) {
        scales[n] = load<float2>(affine + first_of_pair + n * 8);
        shifts[n] = load<float2>(affine + cuts.channels + first_of_pair + n * 8);
      }
      EFFDET_UNROLL
      for (int m = 0; m < G::kAtOnce; ++m) {
        const int tile = first_tile + 2 * m;
        if (tile >= tiles) break;
        float values[8];  // two granules, two pixels, two channels
        EFFDET_UNROLL
        for (int i = 0; i < 8; ++i) {
          const float2 scale = scales[i / 4], shift = shifts[i / 4];
          values[i] = sums[m][i / 4].values[i % 4] * (i % 2 ? scale.y : scale.x) + (i % 2 ? shift.y : shift.x);
        }
        activate_pairs<kAct>(values, p.act);
        unsigned* const at = e_words + (tile * 16 + g) * e_pitch * 4;
        EFFDET_UNROLL
        for (int i = 0; i < 2; ++i) {
          bool exists = true;
          if (!all_exist) {  // zeros around the expanded map
            const int pixel = tile * 16 + g + i * 8, h = first_h + pixel / S::kPixels, w = left + pixel % S::kPixels;
            exists = h >= 0 && h < height && w >= 0 && w < width;
          }
          EFFDET_UNROLL
          for (int n = 0; n < 2; ++n) {
            const int k = 4 * n + 2 * i;
            at[(i * 8 * e_pitch + n) * 4] = exists ? narrow_pair<T>(values[k], values[k + 1]) : 0;
          }
        }
      }
    }
    __syncthreads();  // the expanded rows are there, and those of x were read by all
    if (stage + 1 < stages) begin_stage(stage + 1);
    walk.stage(e_tile + warp_id(), e_pitch, stage * S::kLive, steps, out,
               [&](float (&z)[4], int row, int column) { sum_expanded_taps<T, kAct>(z, p, image, row, column, mine); });
  }
  let_next_kernel_start();
  if (p.sums) walk.store_totals(p.sums + static_cast<std::int64_t>(part) * p.channels + mine, works);
}

template <int kKernel, int kStride>
int launch_of(const ExpandDepthwiseParams& p, void* stream) {
  using S = DepthwiseShape<kKernel, kStride>;
  const int granules = p.channels / kGranule;
  DepthwiseCuts cuts{};
  cuts.segments = divided(p.out_height, p.rows);
  cuts.tiles = divided(p.out_width, S::kColumns);
  cuts.blocks = divided(granules, S::kGranules);
  cuts.channels = divided(divided(granules, cuts.blocks), 2) * 2 * kGranule;
  Grid grid;
  grid.blocks = p.batch * cuts.segments * cuts.tiles * cuts.blocks;
  grid.threads = kWarp * cuts.channels / kGranule;
  grid.shared_bytes = shared_bytes<Stage<kKernel, kStride>>(p, cuts.channels);
  const bool swish = p.act == kSwish && p.last_act == kSwish;
  if (p.dtype == kBFloat16)
    return launch(swish ? expand_depthwise_fwd_kernel<BFloat16, kKernel, kStride, kSwish>
                        : expand_depthwise_fwd_kernel<BFloat16, kKernel, kStride, kAny>,
                  grid, stream, p, cuts);
  return launch(swish ? expand_depthwise_fwd_kernel<Float16, kKernel, kStride, kSwish>
                      : expand_depthwise_fwd_kernel<Float16, kKernel, kStride, kAny>,
                grid, stream, p, cuts);
}

}  // namespace

int expand_depthwise(const ExpandDepthwiseParams& p, void* stream) {
  if (p.kernel == 3) return p.stride == 1 ? launch_of<3, 1>(p, stream) : launch_of<3, 2>(p, stream);
  return p.stride == 1 ? launch_of<5, 1>(p, stream) : launch_of<5, 2>(p, stream);
}

}  // namespace effdet::cuda
