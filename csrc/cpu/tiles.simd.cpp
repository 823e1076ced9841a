// Products of bf16 on tile registers (AMX): 16 rows times the 1 to 3 vectors of a panel, 32 elements of k at a time.
// Packed pairs of k are the order in which the instruction wants its right operand, so that panels are read in place.
#include "cpu/gemm.h"

#if defined(__AMX_BF16__)
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace effdet {
namespace EFFDET_ISA {
namespace {

// GCC's intrinsics do not say that they read memory: what was stored before has to be there.
EFFDET_INLINE void settle(const void* p) {
  __asm__ volatile("" ::"r"(p) : "memory");
}

// AddressSanitizer does not see the instructions either.
EFFDET_INLINE void check_readable([[maybe_unused]] const void* p, [[maybe_unused]] int64_t stride,
                                  [[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  for (int64_t i = 0; i < rows; ++i)
    if (__asan_region_is_poisoned(const_cast<char*>(static_cast<const char*>(p)) + i * stride, bytes)) __builtin_trap();
#endif
}

constexpr int64_t kStep = 32;  // elements of k of one instruction

// Registers 0 to 2 hold sums, 3 a vector of the panel, 4 rows of the input, 5 and 6 the same for the last, shorter
// step.
struct alignas(64) Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64, "as the instruction reads it");

// Defines `name`, one step of k of `pairs` pairs: the registers of instructions have to be literals.
#define EFFDET_TILE_STEP(name, row_register, panel_register)                                          \
  template <int kWidth>                                                                               \
  EFFDET_INLINE void name(const void* rows, int64_t stride, int64_t pairs, const BFloat16* weights) { \
    constexpr int64_t kPairBytes = kWidth * kVectorBytes;                                             \
    check_readable(rows, stride, kTileRows, 4 * pairs);                                               \
    check_readable(weights, 0, 1, pairs * kPairBytes);                                                \
    _tile_loadd(row_register, rows, stride);                                                          \
    _tile_loadd(panel_register, weights, kPairBytes);                                                 \
    _tile_dpbf16ps(0, row_register, panel_register);                                                  \
    if constexpr (kWidth > 1) {                                                                       \
      _tile_loadd(panel_register, weights + 32, kPairBytes);                                          \
      _tile_dpbf16ps(1, row_register, panel_register);                                                \
    }                                                                                                 \
    if constexpr (kWidth > 2) {                                                                       \
      _tile_loadd(panel_register, weights + 64, kPairBytes);                                          \
      _tile_dpbf16ps(2, row_register, panel_register);                                                \
    }                                                                                                 \
  }
EFFDET_TILE_STEP(step, 4, 3)
EFFDET_TILE_STEP(last_step, 6, 5)
#undef EFFDET_TILE_STEP

// What 16 rows from `a` on add to the sums.
template <int kWidth>
EFFDET_INLINE void multiply_segment(const BFloat16* a, int64_t lda, int64_t length, const BFloat16* weights) {
  constexpr int64_t kPairElements = kWidth * 2 * kLanes<float>;
  const int64_t whole = length / kStep * kStep, rest = length - whole;
  for (int64_t k = 0; k < whole; k += kStep) step<kWidth>(a + k, lda * 2, kStep / 2, weights + k / 2 * kPairElements);
  if (!rest) return;
  if (rest % 2 == 0) return last_step<kWidth>(a + whole, lda * 2, rest / 2, weights + whole / 2 * kPairElements);
  // What follows the last element in memory is not part of a pair: it may be infinite.
  alignas(64) BFloat16 copy[kTileRows * kStep];
  const __mmask32 mask = static_cast<__mmask32>((std::uint64_t{1} << rest) - 1);
#pragma GCC unroll 16
  for (int64_t m = 0; m < kTileRows; ++m)
    _mm512_store_si512(copy + m * kStep, _mm512_maskz_loadu_epi16(mask, a + m * lda + whole));
  settle(copy);
  last_step<kWidth>(copy, kStep * 2, divide_up(rest, 2), weights + whole / 2 * kPairElements);
}

template <int kWidth, typename Out>
EFFDET_INLINE void finish(const Epilogue<Out>& out, int64_t row, const float* sums) {
  constexpr int kL = kLanes<float>;
  const int64_t last = out.channels - (kWidth - 1) * kL;  // channels in the last vector
#pragma GCC unroll 4
  for (int v = 0; v < kWidth; ++v) {
    const int64_t n = v == kWidth - 1 ? last : kL;
    Vec<float> value = load(sums + v * kL) * load(out.scale + v * kL) + load(out.shift + v * kL);
    value = activate<float>(value, out.act);
    if (out.residual) value += load_n(out.residual + row * out.ldr + v * kL, n);
    store_n(out.y + row * out.ldy + v * kL, value, n);
  }
}

template <int kWidth, typename Out>
void multiply_tiles_of(const TileInput<BFloat16>& in, const Epilogue<Out>& out, int64_t rows) {
  constexpr int kL = kLanes<float>;
  // Two blocks of sums: those of one are finished while the next are computed, as they go through memory.
  alignas(64) float sums[2][kTileRows][kWidth * kL];
  const int64_t blocks = divide_up(rows, kTileRows),
                segment_vectors = packed_length<BFloat16>(in.segment_length) * kWidth;
  settle(in.weights);
  for (int64_t block = 0; block <= blocks; ++block) {
    if (block < blocks) {
      // The last rows are computed together with some before them, to the same values.
      const int64_t first = most<int64_t>(0, least(block * kTileRows, rows - kTileRows));
      auto& to = sums[block % 2];
      _tile_zero(0);
      if constexpr (kWidth > 1) _tile_zero(1);
      if constexpr (kWidth > 2) _tile_zero(2);
      const auto* weights = static_cast<const BFloat16*>(in.weights);
      for (int64_t s = 0; s < in.segment_count; ++s) {
        multiply_segment<kWidth>(in.segments[s] + first * in.lda, in.lda, in.segment_length, weights);
        weights += segment_vectors * kL;
      }
      if (in.low)
        multiply_segment<kWidth>(in.low + first * in.lda, in.lda, in.segment_length,
                                 static_cast<const BFloat16*>(in.weights));
      _tile_stored(0, to[0], sizeof(to[0]));
      if constexpr (kWidth > 1) _tile_stored(1, to[0] + kL, sizeof(to[0]));
      if constexpr (kWidth > 2) _tile_stored(2, to[0] + 2 * kL, sizeof(to[0]));
    }
    if (block) {
      const int64_t end = least(block * kTileRows, rows);
      const int64_t first = most<int64_t>(0, least((block - 1) * kTileRows, rows - kTileRows));
      for (int64_t row = (block - 1) * kTileRows; row < end; ++row)
        finish<kWidth>(out, row, sums[(block - 1) % 2][row - first]);
    }
  }
}

}  // namespace

TileRegisters<BFloat16>::TileRegisters(int64_t length) {
  Configuration c;
  const int64_t pairs = divide_up(length % kStep, 2);
  c.rows[5] = static_cast<std::uint8_t>(pairs);
  c.row_bytes[6] = static_cast<std::uint16_t>(pairs * 4);
  if (!pairs) c.row_bytes[5] = c.rows[6] = 0;
  settle(&c);
  _tile_loadconfig(&c);
}
TileRegisters<BFloat16>::~TileRegisters() {
  _tile_release();
}

template <typename Out>
void multiply_tiles(const TileInput<BFloat16>& in, const Epilogue<Out>& out, int64_t rows, int64_t width) {
  if (width == 1) return multiply_tiles_of<1>(in, out, rows);
  if (width == 2) return multiply_tiles_of<2>(in, out, rows);
  multiply_tiles_of<3>(in, out, rows);
}
template void multiply_tiles(const TileInput<BFloat16>&, const Epilogue<BFloat16>&, int64_t, int64_t);
template void multiply_tiles(const TileInput<BFloat16>&, const Epilogue<float>&, int64_t, int64_t);

}  // namespace EFFDET_ISA
}  // namespace effdet

#endif
