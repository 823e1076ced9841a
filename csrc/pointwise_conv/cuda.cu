// pointwise_conv, forward: y = act(weight (gate * x) * scale + shift) + residual, a matrix product with everything
// around it in one pass. 16-bit maps go through matrix units: x and the weights come into a ring of slices of the input
// channels by asynchronous copies. What the design costs is in effdet_kernels/ops/pointwise_conv/README.md.
#include "cuda/activation.h"
#include "cuda/launch.h"
#include "cuda/matrix.h"
#include "pointwise_conv/cuda_block.h"

namespace effdet::cuda {
namespace {

// What is fixed when a kernel for 16-bit maps is compiled. A block's warps are kDown by kAcross by kDeep: along its
// pixels, its output channels, and the input channels of a slice, of which each warp then has partial sums.
template <int kRowTiles_, int kColumnTiles_, int kDown_, int kAcross_, int kDeep_, int kSlice_, int kStages_>
struct Cut {
  static constexpr int kRowTiles = kRowTiles_;        // of 16 pixels, of a warp
  static constexpr int kColumnTiles = kColumnTiles_;  // of 8 output channels, of a warp
  static constexpr int kDown = kDown_, kAcross = kAcross_, kDeep = kDeep_;
  static constexpr int kSlice = kSlice_;    // input channels of a stage
  static constexpr int kStages = kStages_;  // of the ring
  static constexpr int kThreads = kWarp * kDown * kAcross * kDeep;
  // Blocks on a multiprocessor, as far as registers count.
  static constexpr int kResident = kDeep * kAcross == 1 && kColumnTiles == 8 ? 3 : 512 / kThreads;
  static constexpr int kPixels = 16 * kRowTiles * kDown;   // of a block
  static constexpr int kOut = 8 * kColumnTiles * kAcross;  // of a block
  static constexpr int kChunks = kSlice / 8;               // of 16 bytes, in a row of a stage
  static constexpr int kLines = kThreads / kChunks;        // rows that the threads copy at once
  static constexpr int kPasses = kPixels / kLines, kWeightPasses = divided(kOut, kLines);
  static constexpr int kStage = (kPixels + kOut) * kChunks;            // in 16 bytes
  static constexpr int kPitch = kOut / 8 | 1;                          // of a row of the output tile, in 16 bytes
  static constexpr int kTiles = kRowTiles * kColumnTiles;              // a warp's sums, 4 a thread each
  static constexpr int kWhole = kTiles / kDeep;                        // of which it stores so many
  static constexpr int kWork = kDown * kAcross * kDeep * kTiles * 32;  // of partial sums, in 16 bytes
  static_assert(kColumnTiles % 2 == 0 && kPixels % kLines == 0 && kLines % 8 == 0 && kTiles % kDeep == 0);
  static_assert(kSlice % (16 * kDeep) == 0);
  static_assert(kPixels * kPitch <= kStages * kStage && (kDeep == 1 || kWork <= kStages * kStage));

  // Where a stage has chunk `chunk` of row `row`, less the rows before, a multiple of 8: any 8 rows next to each other
  // have it in different banks.
  __device__ static constexpr int slot(int row, int chunk) {
    constexpr int kRowsPerLine = kChunks < 8 ? 8 / kChunks : 1;
    return row * kChunks + (chunk ^ row % 8 / kRowsPerLine);
  }
};
template <int kColumnTiles>
using Tall = Cut<2, kColumnTiles, 4, 1, 1, 32, 4>;  // 128 pixels by up to 64 channels
using Broad = Cut<2, 6, 4, 2, 1, 32, 4>;            // 128 pixels by 96 channels
template <int kColumnTiles>
using Small = Cut<2, kColumnTiles, 1, 1, 4, 128, 3>;  // 32 pixels by 16 or 32 channels: many blocks, each soon done

template <typename T>
__device__ __forceinline__ unsigned gated(unsigned pair, const float2& gate) {
  const float2 x = widen_pair<T>(pair);
  return narrow_pair<T>(x.x * gate.x, x.y * gate.y);
}

template <typename T, typename S, bool kGated>
__global__ void __launch_bounds__(S::kThreads, S::kResident)
    pointwise_conv_fwd_matrix_kernel(const PointwiseParams p, const int tiles, const int blocks) {
  Shared shared;
  uint4* const ring = shared.take<uint4>(S::kStages * S::kStage);
  float* const affine = shared.take<float>(2 * S::kOut);
  const Gates gates = kGated ? take_gates(p, shared) : Gates{};
  const bool adds = p.residual.data != nullptr;
  uint4* const out_tile = adds ? shared.take<uint4>(S::kPixels * S::kPitch) : ring;

  const int tile = static_cast<int>(blockIdx.x) / blocks;
  const std::int64_t image = tile / tiles;
  const int pixels = static_cast<int>(p.x.height * p.x.width), width = static_cast<int>(p.x.width);
  const int first = tile % tiles * S::kPixels;
  const int first_out = static_cast<int>(blockIdx.x) % blocks * S::kOut;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), g = lane / 4, t = lane % 4;
  const int deep = warp_id() % S::kDeep, across = warp_id() / S::kDeep % S::kAcross;
  const int down = warp_id() / (S::kDeep * S::kAcross);

  // Where this thread copies: one chunk of rows that are kLines apart. Beyond the last pixel or output channel it is
  // the last one's once more: what comes of it is not stored.
  const int chunk = thread % S::kChunks, line = thread / S::kChunks, slot = S::slot(line, chunk);
  const uint4* const x = reinterpret_cast<const uint4*>(static_cast<const T*>(p.x.data) + image * p.x.batch_stride);
  const uint4* const weight = static_cast<const uint4*>(p.weight);
  int pixel_rows[S::kPasses], weight_rows[S::kWeightPasses];  // where they begin, in 16 bytes
  EFFDET_UNROLL
  for (int i = 0; i < S::kPasses; ++i) {
    const int pixel = min(first + line + i * S::kLines, pixels - 1);
    const std::int64_t at = pixel / width * p.x.row_stride + pixel % width * p.x.pixel_stride;
    pixel_rows[i] = static_cast<int>(at / 8) + chunk;
  }
  EFFDET_UNROLL
  for (int i = 0; i < S::kWeightPasses; ++i)
    weight_rows[i] = min(first_out + line + i * S::kLines, p.out_channels - 1) * (p.in_channels / 8) + chunk;
  const auto begin_stage = [&](int slice) {
    uint4* const stage = ring + slice % S::kStages * S::kStage + slot;
    const bool inside = slice * S::kSlice + chunk * 8 < p.in_channels;
    const int before = inside ? slice * S::kChunks : -chunk;
    EFFDET_UNROLL
    for (int i = 0; i < S::kPasses; ++i)
      begin_copy16(stage + i * S::kLines * S::kChunks, x + (pixel_rows[i] + before), inside);
    EFFDET_UNROLL
    for (int i = 0; i < S::kWeightPasses; ++i) {
      if (S::kOut % S::kLines == 0 || line + i * S::kLines < S::kOut)
        begin_copy16(stage + (S::kPixels + i * S::kLines) * S::kChunks, weight + (weight_rows[i] + before), inside);
    }
  };

  wait_for_previous_kernel();
  if (adds) {  // with the first slice's copies
    const T* const residual = static_cast<const T*>(p.residual.data) + image * p.residual.batch_stride + first_out;
    for (int i = thread; i < S::kPixels * (S::kOut / 8); i += S::kThreads) {
      const int row = i / (S::kOut / 8), vector = i % (S::kOut / 8), pixel = first + row;
      const bool exists = pixel < pixels && first_out + vector * 8 < p.out_channels;
      const std::int64_t at = pixel / width * p.residual.row_stride + pixel % width * p.residual.pixel_stride;
      begin_copy16(out_tile + row * S::kPitch + vector, residual + (exists ? at + vector * 8 : 0), exists);
    }
  }
  const int slices = divided(p.in_channels, S::kSlice);
  EFFDET_UNROLL
  for (int i = 0; i < S::kStages - 1; ++i) {
    if (i < slices) begin_stage(i);
    end_copies();
  }
  load_vectors<T, S::kOut, S::kThreads>(p, image, first_out, affine, gates);

  Products sums[S::kRowTiles][S::kColumnTiles];
  EFFDET_UNROLL
  for (int i = 0; i < S::kRowTiles; ++i) EFFDET_UNROLL
  for (int j = 0; j < S::kColumnTiles; ++j) sums[i][j] = Products{};
  EFFDET_NO_UNROLL
  for (int slice = 0; slice < slices; ++slice) {
    wait_for_copies<S::kStages - 2>();
    __syncthreads();  // the slice is there, and the one before it was read by all
    if (slice + S::kStages - 1 < slices) begin_stage(slice + S::kStages - 1);
    end_copies();
    const uint4* const left_rows = ring + slice % S::kStages * S::kStage + down * S::kRowTiles * 16 * S::kChunks;
    const uint4* const right_rows =
        ring + slice % S::kStages * S::kStage + (S::kPixels + across * S::kColumnTiles * 8) * S::kChunks;
    EFFDET_UNROLL
    for (int i = 0; i < S::kSlice / (16 * S::kDeep); ++i) {
      const int step = i * S::kDeep + deep, channel = slice * S::kSlice + step * 16;
      if (channel < p.in_channels) {
        LeftOperand left[S::kRowTiles];
        EFFDET_UNROLL
        for (int m = 0; m < S::kRowTiles; ++m)
          left[m] = load_matrices<false>(left_rows + m * 16 * S::kChunks + S::slot(lane % 16, 2 * step + lane / 16));
        if constexpr (kGated) {
          const float2 low = load<float2>(gates.values + channel + 2 * t),
                       high = load<float2>(gates.values + channel + 8 + 2 * t);
          EFFDET_UNROLL
          for (int m = 0; m < S::kRowTiles; ++m) EFFDET_UNROLL
          for (int k = 0; k < 4; ++k) left[m].words[k] = gated<T>(left[m].words[k], k < 2 ? low : high);
        }
        EFFDET_UNROLL
        for (int n = 0; n < S::kColumnTiles; n += 2) {
          const LeftOperand four = load_matrices<false>(right_rows + n * 8 * S::kChunks +
                                                        S::slot(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
          EFFDET_UNROLL
          for (int half = 0; half < 2; ++half) {
            const RightOperand right{{four.words[2 * half], four.words[2 * half + 1]}};
            EFFDET_UNROLL
            for (int m = 0; m < S::kRowTiles; ++m) multiply_add<T>(sums[m][n + half], left[m], right);
          }
        }
      }
    }
  }
  wait_for_copies<0>();  // groups without copies are left
  let_next_kernel_start();
  __syncthreads();  // the ring is free

  // The warp's whole sums: number i is of its tile i * kDeep + deep.
  float values[S::kWhole * 4];
  if constexpr (S::kDeep > 1) {
    float4* const parts = reinterpret_cast<float4*>(ring);
    const int group = (down * S::kAcross + across) * S::kDeep;
    EFFDET_UNROLL
    for (int i = 0; i < S::kTiles; ++i) {
      const float (&c)[4] = sums[i / S::kColumnTiles][i % S::kColumnTiles].values;
      store(parts + ((group + deep) * S::kTiles + i) * kWarp + lane, float4{c[0], c[1], c[2], c[3]});
    }
    __syncthreads();
    EFFDET_UNROLL
    for (int i = 0; i < S::kWhole; ++i) {
      float4 sum = load<float4>(parts + (group * S::kTiles + i * S::kDeep + deep) * kWarp + lane);
      EFFDET_UNROLL
      for (int k = 1; k < S::kDeep; ++k) {
        const float4 more = load<float4>(parts + ((group + k) * S::kTiles + i * S::kDeep + deep) * kWarp + lane);
        sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
      }
      values[4 * i] = sum.x;
      values[4 * i + 1] = sum.y;
      values[4 * i + 2] = sum.z;
      values[4 * i + 3] = sum.w;
    }
    __syncthreads();  // the ring is free once more
  } else {
    EFFDET_UNROLL
    for (int i = 0; i < S::kTiles * 4; ++i)
      values[i] = sums[i / 4 / S::kColumnTiles][i / 4 % S::kColumnTiles].values[i % 4];
  }
  const auto column = [&](int i) {  // of the block, the first of this thread's two of whole tile i
    return (across * S::kColumnTiles + (i * S::kDeep + deep) % S::kColumnTiles) * 8 + 2 * t;
  };
  EFFDET_UNROLL
  for (int i = 0; i < S::kWhole; ++i) {
    const float2 scale = load<float2>(affine + column(i)), shift = load<float2>(affine + S::kOut + column(i));
    EFFDET_UNROLL
    for (int half = 0; half < 4; half += 2) {
      values[4 * i + half] = values[4 * i + half] * scale.x + shift.x;
      values[4 * i + half + 1] = values[4 * i + half + 1] * scale.y + shift.y;
    }
  }
  activate<kAny>(values, p.act);
  EFFDET_UNROLL
  for (int i = 0; i < S::kWhole; ++i) {
    const int row = (down * S::kRowTiles + (i * S::kDeep + deep) / S::kColumnTiles) * 16 + g;
    EFFDET_UNROLL
    for (int half = 0; half < 2; ++half) {
      unsigned* const at = reinterpret_cast<unsigned*>(out_tile + (row + half * 8) * S::kPitch) + column(i) / 2;
      float2 pair{values[4 * i + 2 * half], values[4 * i + 2 * half + 1]};
      if (adds) {
        const float2 residual = widen_pair<T>(*at);
        pair = {pair.x + residual.x, pair.y + residual.y};
      }
      *at = narrow_pair<T>(pair.x, pair.y);
    }
  }
  __syncthreads();
  T* const y = static_cast<T*>(p.y) + (image * pixels + first) * p.out_channels + first_out;
  for (int i = thread; i < S::kPixels * (S::kOut / 8); i += S::kThreads) {
    const int row = i / (S::kOut / 8), vector = i % (S::kOut / 8);
    if (first + row < pixels && first_out + vector * 8 < p.out_channels)
      store(y + static_cast<std::int64_t>(row) * p.out_channels + vector * 8, out_tile[row * S::kPitch + vector]);
  }
}

template <typename T, typename S>
int launch_matrix(const PointwiseParams& p, void* stream) {
  const std::size_t more = p.residual.data ? S::kPixels * S::kPitch * 16 : 0;
  return is_gated(p) ? launch_cut<S>(p, more, pointwise_conv_fwd_matrix_kernel<T, S, true>, stream)
                     : launch_cut<S>(p, more, pointwise_conv_fwd_matrix_kernel<T, S, false>, stream);
}

template <typename T>
int launch_of(const PointwiseParams& p, void* stream) {
  if (cuts_of<Tall<8>>(p).all < p.multiprocessors) {
    const bool narrow = p.out_channels <= 16 || cuts_of<Small<4>>(p).all < p.multiprocessors;
    return narrow ? launch_matrix<T, Small<2>>(p, stream) : launch_matrix<T, Small<4>>(p, stream);
  }
  // As few blocks next to each other as there can be, as x is read for each, and those as narrow as they can be.
  const int out = divided(p.out_channels, divided(p.out_channels, Broad::kOut));
  if (out <= 16) return launch_matrix<T, Tall<2>>(p, stream);
  if (out <= 32) return launch_matrix<T, Tall<4>>(p, stream);
  if (out <= 48) return launch_matrix<T, Tall<6>>(p, stream);
  if (out <= 64) return launch_matrix<T, Tall<8>>(p, stream);
  return launch_matrix<T, Broad>(p, stream);
}

}  // namespace

int pointwise_conv(const PointwiseParams& p, void* stream) {
  if (p.dtype == kBFloat16) return launch_of<BFloat16>(p, stream);
  if (p.dtype == kFloat16) return launch_of<Float16>(p, stream);
  return pointwise_conv_float(p, stream);
}

}  // namespace effdet::cuda
