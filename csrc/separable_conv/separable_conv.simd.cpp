// Depthwise, then 1x1 convolution of up to 12 maps in one launch: a work item is a strip of rows of one map.
//
// The strip's input rows, fused and activated, go into a ring as for expand_depthwise; depthwise results of a few
// dozen pixels go into a block that stays in the first-level cache and is multiplied by the packed weights at once.
#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/depthwise.h"
#include "cpu/fusion.h"
#include "cpu/gemm.h"
#include "separable_conv/params.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

constexpr int64_t kRingBytes = 32 * 1024;
constexpr int64_t kBlock = 48;  // pixels of a product, at least, where the map has as many

// On tile registers the depthwise results go in as the sum of two bf16 numbers, which keeps 16 bits of them.
[[maybe_unused]] EFFDET_INLINE void split(const float* from, int64_t count, BFloat16* high, BFloat16* low) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Vec<float> value = load(from + i);
    store(high + i, value);
    const Vec<float> rest = value - load(high + i);
    store(low + i, rest == rest ? rest : Vec<float>{});  // an infinity stays one
  }
}

struct Tiling {
  int64_t columns;  // of one pass over a strip
  int64_t rows;     // that a block holds, if these are all columns
  int64_t strips;
};

template <typename T>
EFFDET_INLINE Tiling tiling(const SeparableParams& p, const SeparableOutput& o, int threads) {
  const int64_t width = round_up(p.channels, kLanes<T>);
  const int64_t fitting = kRingBytes / (o.kernel * width * static_cast<int64_t>(sizeof(Acc<T>)));
  Tiling t;
  t.columns = least(o.width, most<int64_t>(fitting / 8 * 8, 16));
  t.rows = t.columns == o.width ? most<int64_t>(1, kBlock / o.width) : 1;
  const int64_t wanted = divide_up(int64_t{4} * threads, most<int64_t>(1, p.batch));
  t.strips = most<int64_t>(1, least(wanted, o.height / most<int64_t>(t.rows, 2)));
  return t;
}

template <typename T>
EFFDET_INLINE int64_t ring_size(const SeparableParams& p, const SeparableOutput& o, const Tiling& t) {
  return Ring<Acc<T>>::size(o.kernel, t.columns + o.kernel - 1, round_up(p.channels, kLanes<T>));
}

// Rows of a product that memory is there for.
EFFDET_INLINE int64_t block_rows(const Tiling& t) {
  return round_up(t.rows * t.columns, kTileRows);
}

template <typename T>
void strip(const SeparableParams& p, const SeparableOutput& o, const Tiling& t, int64_t image, int64_t first_row,
           int64_t end_row, Acc<T>* memory) {
  using A = Acc<T>;
  const int64_t width = round_up(p.channels, kLanes<T>), half = o.kernel / 2;
  A* block = memory + ring_size<T>(p, o, t);  // [pixels, width], then the halves that it is split to, where it is
  const A* rows[kMaxKernel];
  for (int64_t column = 0; column < o.width; column += t.columns) {
    const int64_t count = least(t.columns, o.width - column);
    const int64_t begin = column - half, places = count + o.kernel - 1;
    const int64_t from = most<int64_t>(begin, 0), to = least(begin + places, o.width);
    const Ring<A> ring(memory, o.kernel, places, width);
    ring.clear();
    int64_t made = most<int64_t>(0, first_row - half);
    for (int64_t row = first_row; row < end_row; row += t.rows) {
      const int64_t row_count = least(t.rows, end_row - row);
      for (int64_t r = row; r < row + row_count; ++r) {
        for (; made < least(r + half + 1, o.height); ++made) {
          fuse_row<T>(o.x, p.fusion, p.pre_act, image, p.channels, made, o.height, o.width, from, to - from,
                      ring.row(made) + (from - begin) * width);
        }
        for (int64_t i = 0; i < o.kernel; ++i) {
          const int64_t h = r - half + i;
          rows[i] = h >= 0 && h < o.height ? ring.row(h) : ring.zeros;
        }
        const RowEpilogue<A> middle{nullptr, nullptr, kNone, block + (r - row) * count * width, width, width, nullptr};
        convolve_row<A>(rows, o.kernel, 1, width, count, static_cast<const A*>(o.dw_weights), middle);
      }
      Epilogue<T> out;
      out.scale = static_cast<const A*>(o.scale);
      out.shift = static_cast<const A*>(o.shift);
      out.act = p.act;
      out.channels = o.out_channels;
      out.y = static_cast<T*>(o.y) + ((image * o.height + row) * o.width + column) * o.out_channels;
      out.ldy = o.out_channels;
      out.residual = nullptr;
      out.ldr = 0;
      if constexpr (kTiles<T>) {
        const int64_t size = block_rows(t) * width;
        T *high = reinterpret_cast<T*>(block + size), *low = high + size;
        split(block, row_count * count * width, high, low);
        const T* a = high;
        multiply<T, T>({&a, 1, p.channels, width, o.pw_weights, low}, out, row_count * count);
      } else {
        const A* a = block;
        multiply<A, T>({&a, 1, p.channels, width, o.pw_weights}, out, row_count * count);
      }
    }
  }
}

template <typename T>
Status run(const SeparableParams& p, int threads) {
  using A = Acc<T>;
  int64_t begin[kMaxOutputs + 1] = {0}, bytes = 0;
  Tiling tilings[kMaxOutputs];
  const int64_t width = round_up(p.channels, kLanes<T>);
  for (int64_t i = 0; i < p.count; ++i) {
    const SeparableOutput& o = p.outputs[i];
    const Tiling t = tilings[i] = tiling<T>(p, o, threads);
    begin[i + 1] = begin[i] + p.batch * t.strips;
    const int64_t elements = ring_size<T>(p, o, t) + block_rows(t) * width * (kTiles<T> ? 2 : 1);
    bytes = most(bytes, elements * static_cast<int64_t>(sizeof(A)));
  }
  int status = kOk;
  parallel_for(begin[p.count], threads, [&](int64_t item) {
    A* memory = static_cast<A*>(thread_scratch(bytes));
    if (!memory) {
      __atomic_store_n(&status, kOutOfMemory, __ATOMIC_RELAXED);
      return;
    }
    const TileRegisters<T> registers(p.channels);
    int64_t i = 0;
    while (item >= begin[i + 1]) ++i;
    const SeparableOutput& o = p.outputs[i];
    const Tiling& t = tilings[i];
    const int64_t part = (item - begin[i]) % t.strips, image = (item - begin[i]) / t.strips;
    strip<T>(p, o, t, image, o.height * part / t.strips, o.height * (part + 1) / t.strips, memory);
  });
  return static_cast<Status>(status);
}

}  // namespace

int separable_product_dtype(int dtype) {
  return dtype == kBFloat16 && !kTiles<BFloat16> ? kFloat32 : dtype;
}

Status separable_conv(const SeparableParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
