// The tiles of gemm.h: for each number of rows and vectors one function whose sums stay in registers.
#include "cpu/gemm.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

// Elements of k that are added up before they join what came before: rounding errors grow with the length of a sum.
constexpr int64_t kChunk = 64;

template <int kCount, int kWidth, typename T>
EFFDET_INLINE void accumulate(const TileInput<T>& in, int64_t first_row, Vec<Acc<T>> (&sum)[kCount][kWidth]) {
  using V = Vec<Acc<T>>;
  constexpr int kL = kLanes<T>;
  const Acc<T>* w = static_cast<const Acc<T>*>(in.weights);
  alignas(64) Acc<T> before[kCount][kWidth * kL];  // the sums of all chunks but the last
  bool joins = false;
  for (int64_t s = 0; s < in.segment_count; ++s) {
    const T* row[kCount];
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) row[m] = in.segments[s] + (first_row + m) * in.lda;
    for (int64_t begin = 0; begin < in.segment_length; begin += kChunk) {
      if (begin) {
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m)
#pragma GCC unroll 4
          for (int v = 0; v < kWidth; ++v) {
            store(before[m] + v * kL, joins ? sum[m][v] + load(before[m] + v * kL) : sum[m][v]);
            sum[m][v] = V{};
          }
        joins = true;
      }
      const int64_t end = least(begin + kChunk, in.segment_length);
      for (int64_t k = begin; k < end; ++k) {
        V b[kWidth];
#pragma GCC unroll 4
        for (int v = 0; v < kWidth; ++v) b[v] = load(w + v * kL);
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m) {
          const V a = splat<Acc<T>>(widen(row[m][k]));
#pragma GCC unroll 4
          for (int v = 0; v < kWidth; ++v) sum[m][v] = a * b[v] + sum[m][v];
        }
        w += kWidth * kL;
      }
    }
  }
  if (joins) {
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) sum[m][v] += load(before[m] + v * kL);
  }
}

#if defined(__AVX512BF16__)
template <int kCount, int kWidth>
EFFDET_INLINE void accumulate(const TileInput<BFloat16>& in, int64_t first_row, Vec<float> (&sum)[kCount][kWidth]) {
  const BFloat16* w = static_cast<const BFloat16*>(in.weights);
  auto step = [&](auto pair) __attribute__((always_inline)) {
    __m512bh b[kWidth];
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) std::memcpy(&b[v], w + v * 2 * kLanes<BFloat16>, sizeof(b[v]));
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
      const __m512bh a = bit_cast<__m512bh>(_mm512_set1_epi32(pair(m)));
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], a, b[v]);
    }
    w += kWidth * 2 * kLanes<BFloat16>;
  };
  for (int64_t s = 0; s < in.segment_count; ++s) {
    const BFloat16* row[kCount];
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) row[m] = in.segments[s] + (first_row + m) * in.lda;
    int64_t k = 0;
    for (; k + 2 <= in.segment_length; k += 2) {
      step([&](int m) __attribute__((always_inline)) {
        std::int32_t pair;
        std::memcpy(&pair, row[m] + k, sizeof(pair));
        return pair;
      });
    }
    if (k < in.segment_length) {
      step([&](int m) __attribute__((always_inline)) { return static_cast<std::int32_t>(row[m][k].bits); });
    }
  }
}
#endif

// The sums of a tile to their place, through memory where there is more to do than an affine map.
template <int kCount, int kWidth, typename Out>
EFFDET_INLINE void finish(const Epilogue<Out>& out, int64_t first_row, Vec<Acc<Out>> (&sum)[kCount][kWidth]) {
  using A = Acc<Out>;
  constexpr int kL = kLanes<Out>;
  const int64_t last = out.channels - (kWidth - 1) * kL;  // channels in the last vector
#pragma GCC unroll 4
  for (int v = 0; v < kWidth; ++v) {
    const Vec<A> scale = load(out.scale + v * kL), shift = load(out.shift + v * kL);
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) sum[m][v] = sum[m][v] * scale + shift;
  }
  if (out.act == kRelu || out.act == kRelu6) {
    const Vec<A> largest = splat<A>(out.act == kRelu6 ? A(6) : static_cast<A>(__builtin_inf()));
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) sum[m][v] = upper(lower(sum[m][v], Vec<A>{}), largest);
  }
  const bool done = out.act == kNone || out.act == kRelu || out.act == kRelu6;
  if (done && !out.residual) {
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v)
        store_n(out.y + (first_row + m) * out.ldy + v * kL, sum[m][v], v == kWidth - 1 ? last : kL);
    return;
  }
  alignas(64) A buffer[kCount][kWidth * kL];
#pragma GCC unroll 8
  for (int m = 0; m < kCount; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) store(buffer[m] + v * kL, sum[m][v]);
  for (int m = 0; m < kCount; ++m) {
    Out* y = out.y + (first_row + m) * out.ldy;
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) {
      const int64_t n = v == kWidth - 1 ? last : kL;
      Vec<A> value = activate<A>(load(buffer[m] + v * kL), done ? kNone : out.act);
      if (out.residual) value += load_n(out.residual + (first_row + m) * out.ldr + v * kL, n);
      store_n(y + v * kL, value, n);
    }
  }
}

template <int kCount, int kWidth, typename T, typename Out>
void tile_of(const TileInput<T>& in, const Epilogue<Out>& out, int64_t first_row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Vec<Acc<T>> sum[kCount][kWidth] = {};
    accumulate<kCount, kWidth>(in, first_row + i * kCount, sum);
    finish<kCount, kWidth>(out, first_row + i * kCount, sum);
  }
}

template <int kWidth, typename T, typename Out>
Tile<T, Out> with_rows(int64_t rows) {
  switch (rows) {
    case 1:
      return tile_of<1, kWidth, T, Out>;
    case 2:
      return tile_of<2, kWidth, T, Out>;
    case 3:
      return tile_of<3, kWidth, T, Out>;
#if defined(__AVX512F__)
    case 4:
      return tile_of<4, kWidth, T, Out>;
    case 5:
      return tile_of<5, kWidth, T, Out>;
    case 6:
      return tile_of<6, kWidth, T, Out>;
    case 7:
      return tile_of<7, kWidth, T, Out>;
#endif
    default:
      return tile_of<kRows, kWidth, T, Out>;
  }
}

}  // namespace

template <typename T, typename Out>
Tile<T, Out> tile(int64_t rows, int64_t width) {
  if (width == 1) return with_rows<1, T, Out>(rows);
  if (width == 2) return with_rows<2, T, Out>(rows);
  return with_rows<3, T, Out>(rows);
}

template Tile<float, float> tile(int64_t, int64_t);
template Tile<double, double> tile(int64_t, int64_t);
template Tile<BFloat16, BFloat16> tile(int64_t, int64_t);
template Tile<BFloat16, float> tile(int64_t, int64_t);
template Tile<float, BFloat16> tile(int64_t, int64_t);

}  // namespace EFFDET_ISA
}  // namespace effdet
