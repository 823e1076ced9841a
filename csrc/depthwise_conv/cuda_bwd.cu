// The gradients of a depthwise convolution's x and weight, both in one pass over x and the output's gradient.
//
// In coordinates of the padded input, h' = h + top and w' = w + left, a pixel of x meets the gradient's pixels
// ((h' - i) / stride, (w' - j) / stride) for the taps (i, j) that leave no rest:
//   dx[h', w'] = sum of weight[i, j] * grad[...],   dweight[i, j] = sum over pixels of x[h', w'] * grad[...].
// A block owns pixels of x, so that both sums meet the same pixels of the gradient. For dx they are the left operand,
// 16 pixels by 8 channels at two taps, and the weights two diagonals, as in the forward. For dweight the left operand
// is the transpose, 8 channels at two taps by 16 pixels, and x the right one: of each product [16, 8] the diagonals
// count.
#include "cuda/launch.h"
#include "cuda/matrix.h"
#include "depthwise_conv/granule.h"
#include "depthwise_conv/params.h"

namespace effdet::cuda {
namespace {

constexpr int kUnits = 2;  // of 16 pixels of x, that a warp makes at a time: next to each other, or every other one
constexpr int kStages = 2;

template <int kKernel, int kStride>
struct Shape {
  static constexpr int kGranules = 4;                      // at most, of a block, a warp each
  static constexpr int kTaps = divided(kKernel, kStride);  // in a row, that a pixel of x meets at most
  static constexpr int kPairs = divided(kTaps, 2);
  static constexpr int kLeft = kStride == 1 ? 2 : 1;  // left operands of a gradient's row and pair: units share them
  static constexpr int kGradPixels = 16 * kLeft + 2 * kPairs - 1;
  static constexpr int kPixels = 16 * kUnits;                           // of a row of x
  static constexpr int kRows = kStride * kTaps;                         // of x that are unfinished at a time
  static constexpr int kStage = kTaps * kGradPixels + kRows * kPixels;  // pixels of a stage, kTaps steps
  // Pairs of taps that the w' of rest `rest` meet, and the first of all in an array over rests.
  __host__ __device__ static constexpr int pairs(int rest) { return divided(divided(kKernel - rest, kStride), 2); }
  static constexpr int kAllPairs = pairs(0) + (kStride == 2 ? pairs(1) : 0);
};

// The gradients of the pixels (h, w) and (h, w + 8 * stride) of x, two channels each, tap by tap, from global memory; h
// and w in coordinates of the padded input.
template <typename T>
__device__ void sum_taps(float (&sums)[4], const DepthwiseGradientParams& p, std::int64_t image, int h, int w,
                         int channel) {
  const T* grad = static_cast<const T*>(p.grad.data) + image * p.grad.batch_stride + channel;
  const int taps = p.kernel * p.kernel;
  const T* weight = static_cast<const T*>(p.weight) + static_cast<std::int64_t>(channel) * taps;
  EFFDET_UNROLL
  for (int i = 0; i < 4; ++i) sums[i] = 0.0f;
  EFFDET_NO_UNROLL
  for (int tap = 0; tap < taps; ++tap) {
    const int row = h - tap / p.kernel, column = w - tap % p.kernel;
    if (row < 0 || row % p.stride != 0 || row / p.stride >= p.grad.height) continue;
    EFFDET_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int of = column + i / 2 * 8 * p.stride;
      if (of < 0 || of % p.stride != 0 || of / p.stride >= p.grad.width) continue;
      const T* at = grad + row / p.stride * p.grad.row_stride + of / p.stride * p.grad.pixel_stride + i % 2;
      sums[i] += widen(*at) * widen(weight[i % 2 * taps + tap]);
    }
  }
}

template <typename T, int kKernel, int kStride>
__global__ void __launch_bounds__(kWarp* Shape<kKernel, kStride>::kGranules)
    depthwise_conv_bwd_matrix_kernel(const DepthwiseGradientParams p, const DepthwiseCuts cuts) {
  using S = Shape<kKernel, kStride>;
  const int granules = cuts.channels / kGranule, pitch = padded(granules);
  Shared shared;
  uint4* const ring = shared.take<uint4>(kStages * S::kStage * pitch);

  const int part = static_cast<int>(blockIdx.x / cuts.blocks);
  const int first_channel = static_cast<int>(blockIdx.x % cuts.blocks) * cuts.channels;
  const int group = part / (cuts.tiles * cuts.segments);  // below the batch
  // Of x, in coordinates of the padded input; multiples of the stride.
  const int first_row = (p.top / kStride) * kStride + part / cuts.tiles % cuts.segments * p.rows;
  const int first_column = (p.left / kStride) * kStride + part % cuts.tiles * S::kPixels;
  const int last_row = min(first_row + p.rows, p.top + static_cast<int>(p.x.height));
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int channel = first_channel + warp_id() * kGranule;
  const bool works = channel < p.channels;

  const int steps = divided(last_row - first_row, kStride) + S::kTaps - 1;
  const int stages = divided(steps, S::kTaps);  // of an image
  const int images = divided(static_cast<int>(p.batch) - group, p.groups);
  const int all_stages = images * stages;

  // Offsets in an image have 32 bits.
  const int grad_row = static_cast<int>(p.grad.row_stride), grad_pixel = static_cast<int>(p.grad.pixel_stride);
  const int x_row = static_cast<int>(p.x.row_stride), x_pixel = static_cast<int>(p.x.pixel_stride);
  const int height = static_cast<int>(p.x.height), width = static_cast<int>(p.x.width);
  const int grad_height = static_cast<int>(p.grad.height), grad_width = static_cast<int>(p.grad.width);
  const int copied_granule = static_cast<int>(threadIdx.x) % granules;
  const int copied_pixel = static_cast<int>(threadIdx.x) / granules;
  const bool copies = first_channel + copied_granule * kGranule < p.channels;
  const int first_grad_row = first_row / kStride - (S::kTaps - 1);
  const int first_grad_column = first_column / kStride - (2 * S::kPairs - 1);
  const auto begin_stage = [&](int number) {
    const std::int64_t image = group + number / stages * p.groups;
    const int stage = number % stages;
    uint4* const to = ring + number % kStages * S::kStage * pitch + copied_granule;
    const T* const grad =
        static_cast<const T*>(p.grad.data) + image * p.grad.batch_stride + first_channel + copied_granule * kGranule;
    for (int i = copied_pixel; i < S::kTaps * S::kGradPixels; i += kWarp) {
      const int r = first_grad_row + stage * S::kTaps + i / S::kGradPixels, c = first_grad_column + i % S::kGradPixels;
      const bool exists = copies && r >= 0 && r < grad_height && c >= 0 && c < grad_width;
      begin_copy16(to + i * pitch, grad + (exists ? r * grad_row + c * grad_pixel : 0), exists);
    }
    if (p.dweight) {
      const T* const x =
          static_cast<const T*>(p.x.data) + image * p.x.batch_stride + first_channel + copied_granule * kGranule;
      for (int i = copied_pixel; i < S::kRows * S::kPixels; i += kWarp) {
        const int row = first_row + stage * S::kRows + i / S::kPixels;
        const int h = row - p.top, w = first_column + i % S::kPixels - p.left;
        const bool exists = copies && row < last_row && h >= 0 && w >= 0 && w < width;
        begin_copy16(to + (S::kTaps * S::kGradPixels + i) * pitch, x + (exists ? h * x_row + w * x_pixel : 0), exists);
      }
    }
    end_copies();
  };

  wait_for_previous_kernel();
  if (all_stages > 0) begin_stage(0);

  // Of tap (i, rest + stride * m) as in the forward; unit u meets those of rest u, or with stride 1 all.
  RightOperand weights[kKernel][S::kAllPairs];
  const T* const weight = static_cast<const T*>(p.weight) + static_cast<std::int64_t>(channel + g) * kKernel * kKernel;
  EFFDET_UNROLL
  for (int i = 0; i < kKernel; ++i) {
    EFFDET_UNROLL
    for (int rest = 0; rest < kStride; ++rest) {
      EFFDET_UNROLL
      for (int m = 0; m < 2 * S::pairs(rest); ++m) {
        const int j = rest + kStride * m;
        unsigned bits = 0;
        if (p.dx && works && t == g / 2 && j < kKernel) bits = weight[i * kKernel + j].bits;
        weights[i][rest * S::pairs(0) + m / 2].words[m % 2] = bits << 16 * (g % 2);
      }
    }
  }
  Products dweight[kKernel][S::kAllPairs];
  EFFDET_UNROLL
  for (int i = 0; i < kKernel; ++i) EFFDET_UNROLL
  for (int k = 0; k < S::kAllPairs; ++k) dweight[i][k] = Products{};
  Products dx[S::kRows][kUnits];
  RightOperand x[S::kRows][kUnits];
  EFFDET_UNROLL
  for (int i = 0; i < S::kRows; ++i) EFFDET_UNROLL
  for (int u = 0; u < kUnits; ++u) {
    dx[i][u] = Products{};
    x[i][u] = RightOperand{};
  }

  for (int number = 0; number < all_stages; ++number) {
    const std::int64_t image = group + number / stages * p.groups;
    const int stage = number % stages;
    if (number + 1 < all_stages) {
      begin_stage(number + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    T* const of_image = static_cast<T*>(p.dx) + image * height * width * p.channels + channel + 2 * t;
    const uint4* const grad_rows = ring + number % kStages * S::kStage * pitch + warp_id();
    const uint4* const x_rows = grad_rows + S::kTaps * S::kGradPixels * pitch;
    const int lane = lane_id();
    EFFDET_UNROLL
    for (int phase = 0; phase < S::kTaps; ++phase) {
      const int step = stage * S::kTaps + phase;
      if (step < steps) {
        EFFDET_UNROLL
        for (int e = 0; e < kStride; ++e) {  // rows of x that begin
          const int slot = kStride * phase + e;
          EFFDET_UNROLL
          for (int u = 0; u < kUnits; ++u) dx[slot][u] = Products{};
          if (p.dweight) {
            // Pixels 0 to 7 and 8 to 15 of each unit.
            const int of_unit = lane % 16, pixel = kStride == 1 ? lane : of_unit * 2 + lane / 16;
            const LeftOperand both = load_matrices<true>(x_rows + (slot * S::kPixels + pixel) * pitch);
            EFFDET_UNROLL
            for (int u = 0; u < kUnits; ++u) x[slot][u] = {both.words[2 * u], both.words[2 * u + 1]};
          }
        }
        EFFDET_UNROLL
        for (int left = 0; left < S::kLeft; ++left) {
          EFFDET_UNROLL
          for (int pair = 0; pair < S::kPairs; ++pair) {
            // The first of the two taps is a pixel further right.
            const uint4* const first =
                grad_rows + (phase * S::kGradPixels + left * 16 + 2 * (S::kPairs - pair) - 1) * pitch;
            LeftOperand pixels{}, transposed{};
            if (p.dx) pixels = load_matrices<false>(first + (lane % 16 - lane / 16) * pitch);
            if (p.dweight) transposed = load_matrices<true>(first + (lane % 8 + lane / 16 * 8 - lane / 8 % 2) * pitch);
            EFFDET_UNROLL
            for (int u = 0; u < kUnits; ++u) {
              const int rest = kStride == 1 ? 0 : u;
              if ((kStride == 1 && u != left) || pair >= S::pairs(rest)) continue;
              const int of_pair = rest * S::pairs(0) + pair;
              EFFDET_UNROLL
              for (int i = 0; i < kKernel; ++i) {
                const int slot = (kStride * (phase + 1) + i) % S::kRows;
                if (p.dx) multiply_add<T>(dx[slot][u], pixels, weights[i][of_pair]);
                if (p.dweight) multiply_add<T>(dweight[i][of_pair], transposed, x[slot][u]);
              }
            }
          }
        }
        EFFDET_UNROLL
        for (int e = 0; e < kStride; ++e) {  // rows of x that end
          const int slot = (kStride * (phase + 1) + e) % S::kRows;
          const int row = first_row + kStride * (step - (S::kTaps - 1)) + e;
          if (p.dx && works && row >= first_row && row >= p.top && row < last_row) {
            EFFDET_UNROLL
            for (int u = 0; u < kUnits; ++u) {
              float (&z)[4] = dx[slot][u].values;
              const int column = first_column + (kStride == 1 ? u * 16 + g : 2 * g + u);
              constexpr int kApart = 8 * kStride;
              if (!finite(z[0] + z[1] + z[2] + z[3])) sum_taps<T>(z, p, image, row, column, channel + 2 * t);
              EFFDET_UNROLL
              for (int half = 0; half < 2; ++half) {
                const int w = column + half * kApart - p.left;
                if (w >= 0 && w < width)
                  store(of_image + ((row - p.top) * width + w) * p.channels,
                        narrow_pair<T>(z[2 * half], z[2 * half + 1]));
              }
            }
          }
        }
      }
    }
    __syncthreads();
  }
  let_next_kernel_start();
  if (p.dweight && works && t == g / 2) {
    float* const to = p.dweight + (static_cast<std::int64_t>(part) * p.channels + channel + g) * kKernel * kKernel;
    EFFDET_UNROLL
    for (int i = 0; i < kKernel; ++i) {
      EFFDET_UNROLL
      for (int rest = 0; rest < kStride; ++rest) {
        EFFDET_UNROLL
        for (int m = 0; m < 2 * S::pairs(rest); ++m) {
          const int j = rest + kStride * m;
          const float (&sums)[4] = dweight[i][rest * S::pairs(0) + m / 2].values;
          if (j < kKernel) to[i * kKernel + j] = g % 2 == 0 ? sums[m % 2 * 2] : sums[m % 2 * 2 + 1];
        }
      }
    }
  }
}

// float32: a thread takes a channel, and of a row of x every kAcross-th pixel.
constexpr int kThreads = 128, kChannels = 32, kAcross = kThreads / kChannels;
constexpr int kTapsTile = 32;  // pixels of a row

template <int kKernel, int kStride>
__global__ void __launch_bounds__(kThreads, 4)
    depthwise_conv_bwd_taps_kernel(const DepthwiseGradientParams p, const DepthwiseCuts cuts) {
  constexpr int kTaps = kKernel * kKernel;
  Shared shared;
  float* const sums = shared.take<float>(kAcross * kChannels * kTaps);
  const int part = static_cast<int>(blockIdx.x / cuts.blocks);
  const int channel =
      static_cast<int>(blockIdx.x % cuts.blocks) * kChannels + static_cast<int>(threadIdx.x) % kChannels;
  const int across = static_cast<int>(threadIdx.x) / kChannels;
  const int group = part / (cuts.tiles * cuts.segments);
  const int first_row = (p.top / kStride) * kStride + part / cuts.tiles % cuts.segments * p.rows;
  const int first_column = (p.left / kStride) * kStride + part % cuts.tiles * kTapsTile;
  const int last_row = min(first_row + p.rows, p.top + static_cast<int>(p.x.height));
  const int last_column = min(first_column + kTapsTile, p.left + static_cast<int>(p.x.width));
  const bool works = channel < p.channels;

  wait_for_previous_kernel();
  float weights[kTaps], dweight[kTaps];
  EFFDET_UNROLL
  for (int tap = 0; tap < kTaps; ++tap) {
    weights[tap] = works ? static_cast<const float*>(p.weight)[static_cast<std::int64_t>(channel) * kTaps + tap] : 0.0f;
    dweight[tap] = 0.0f;
  }
  if (works) {
    for (std::int64_t image = group; image < p.batch; image += p.groups) {
      const float* const grad = static_cast<const float*>(p.grad.data) + image * p.grad.batch_stride + channel;
      const float* const x = static_cast<const float*>(p.x.data) + image * p.x.batch_stride + channel;
      for (int row = max(first_row, p.top); row < last_row; ++row) {
        for (int column = first_column + across; column < last_column; column += kAcross) {
          const int h = row - p.top, w = column - p.left;
          if (w < 0) continue;
          const float pixel = x[h * p.x.row_stride + w * p.x.pixel_stride];
          float dx = 0.0f;
          EFFDET_UNROLL
          for (int i = 0; i < kKernel; ++i) {
            const int r = row - i;
            if (r < 0 || r % kStride != 0 || r / kStride >= p.grad.height) continue;
            EFFDET_UNROLL
            for (int j = 0; j < kKernel; ++j) {
              const int c = column - j;
              if (c < 0 || c % kStride != 0 || c / kStride >= p.grad.width) continue;
              const float value = grad[r / kStride * p.grad.row_stride + c / kStride * p.grad.pixel_stride];
              dx += weights[i * kKernel + j] * value;
              dweight[i * kKernel + j] += pixel * value;
            }
          }
          if (p.dx) static_cast<float*>(p.dx)[((image * p.x.height + h) * p.x.width + w) * p.channels + channel] = dx;
        }
      }
    }
  }
  let_next_kernel_start();
  if (p.dweight) {
    EFFDET_UNROLL
    for (int tap = 0; tap < kTaps; ++tap) sums[static_cast<int>(threadIdx.x) * kTaps + tap] = dweight[tap];
    __syncthreads();
    if (works && across == 0) {
      float* const to = p.dweight + (static_cast<std::int64_t>(part) * p.channels + channel) * kTaps;
      for (int tap = 0; tap < kTaps; ++tap) {
        float sum = 0.0f;
        for (int k = 0; k < kAcross; ++k) sum += sums[(static_cast<int>(threadIdx.x) + k * kChannels) * kTaps + tap];
        to[tap] = sum;
      }
    }
  }
}

template <int kKernel, int kStride>
int launch_of(const DepthwiseGradientParams& p, void* stream) {
  const DepthwiseCuts cuts = depthwise_gradient_cuts(p);
  Grid grid;
  grid.blocks = std::int64_t{p.groups} * cuts.segments * cuts.tiles * cuts.blocks;
  if (p.dtype == kFloat32) {
    grid.threads = kThreads;
    grid.shared_bytes = Shared::rounded(kThreads * kKernel * kKernel * 4);
    return launch(depthwise_conv_bwd_taps_kernel<kKernel, kStride>, grid, stream, p, cuts);
  }
  const int granules = cuts.channels / kGranule;
  grid.threads = kWarp * granules;
  grid.shared_bytes = std::size_t{16} * kStages * Shape<kKernel, kStride>::kStage * padded(granules);
  if (p.dtype == kBFloat16)
    return launch(depthwise_conv_bwd_matrix_kernel<BFloat16, kKernel, kStride>, grid, stream, p, cuts);
  return launch(depthwise_conv_bwd_matrix_kernel<Float16, kKernel, kStride>, grid, stream, p, cuts);
}

}  // namespace

DepthwiseCuts depthwise_gradient_cuts(const DepthwiseGradientParams& p) {
  DepthwiseCuts cuts{};
  const int height = static_cast<int>(p.x.height), width = static_cast<int>(p.x.width);
  cuts.segments = divided(height + p.top % p.stride, p.rows);
  cuts.tiles = divided(width + p.left % p.stride, 16 * kUnits);
  if (p.dtype == kFloat32) {
    cuts.channels = kChannels;
    cuts.blocks = divided(p.channels, kChannels);
    return cuts;
  }
  const int granules = p.channels / kGranule;
  cuts.blocks = divided(granules, Shape<3, 1>::kGranules);
  cuts.channels = divided(granules, cuts.blocks) * kGranule;
  return cuts;
}

int depthwise_conv_gradient(const DepthwiseGradientParams& p, void* stream) {
  if (p.kernel == 3) return p.stride == 1 ? launch_of<3, 1>(p, stream) : launch_of<3, 2>(p, stream);
  return p.stride == 1 ? launch_of<5, 1>(p, stream) : launch_of<5, 2>(p, stream);
}

}  // namespace effdet::cuda
