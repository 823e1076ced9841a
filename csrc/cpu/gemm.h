// Matrix products with small tiles: rows of `a` (pixels) times packed weights, then an epilogue.
//
// Packed weights: output channels are grouped to vectors and vectors to panels of at most 3, as equal as possible.
// A panel holds, for each k, its vectors one after another, so that a tile reads it from start to end. For the bf16 dot
// instruction each element is a pair of consecutive k. A convolution's k runs over `segments` (kernel rows), each
// contiguous in a padded row of the input and padded to whole pairs.
#pragma once

#include "cpu/activation.h"

namespace effdet {
namespace EFFDET_ISA {

constexpr int kPanel = 3;

// Whether inputs of type T are multiplied in pairs, by the bf16 dot instruction; else weights are packed as Acc<T>.
template <typename T>
constexpr bool kPairs = false;
template <>
inline constexpr bool kPairs<BFloat16> = kHasBf16Dot;

// Elements of k that a segment of `length` takes up in packed weights.
template <typename T>
EFFDET_INLINE int64_t packed_length(int64_t length) {
  return kPairs<T> ? round_up(length, 2) : length;
}
// Bytes of one vector of packed weights per element of k.
template <typename T>
constexpr int64_t kPackedBytes = kPairs<T> ? kVectorBytes / 2 : kVectorBytes;

struct Panels {
  int64_t vectors, count;
  EFFDET_INLINE explicit Panels(int64_t vectors_) : vectors(vectors_), count(divide_up(vectors_, kPanel)) {}
  EFFDET_INLINE int64_t start(int64_t panel) const {  // the panel's first vector
    return panel * (vectors / count) + least(panel, vectors % count);
  }
  EFFDET_INLINE int64_t width(int64_t panel) const { return start(panel + 1) - start(panel); }
};

template <typename T>
EFFDET_INLINE int64_t vectors_of(int64_t channels) {
  return divide_up(channels, kLanes<T>);
}

// What happens to a tile's sums: y = act(sum * scale + shift) + residual, for `channels` columns.
template <typename Out>
struct Epilogue {
  const Acc<Out>* scale;  // both padded to whole vectors
  const Acc<Out>* shift;
  int act;
  int64_t channels;
  Out* y;
  int64_t ldy;
  const Out* residual;  // or null
  int64_t ldr;
};

template <typename T>
struct TileInput {
  const T* const* segments;  // per segment the first row
  int64_t segment_count, segment_length;
  int64_t lda;             // from row to row, in elements
  const void* weights;     // the panel
  const T* low = nullptr;  // or the first row of a second term: the values are the sums of both (kTiles)
};

// Tiles of `rows` (1 to kRows) times `width` (1 to kPanel) vectors, `count` of them below each other from `first_row`
// on.
template <typename T, typename Out>
using Tile = void (*)(const TileInput<T>&, const Epilogue<Out>&, int64_t first_row, int64_t count);
template <typename T, typename Out>
Tile<T, Out> tile(int64_t rows, int64_t width);

// Whether products of type T run on tile registers (AMX), 16 rows at a time, where there are as many rows; the thread
// holds a TileRegisters then. With a second term they always do: 16 rows must be readable, of which `rows` are written.
template <typename T>
constexpr bool kTiles = kHasTiles && kPairs<T>;
constexpr int64_t kTileRows = 16;

template <typename Out>
void multiply_tiles(const TileInput<BFloat16>& in, const Epilogue<Out>& out, int64_t rows, int64_t width);

// Sets this thread's tile registers up for as long as it lives, for segments of `length` of type T.
template <typename T>
struct TileRegisters {
  EFFDET_INLINE explicit TileRegisters(int64_t /*length*/) {}
};
#if defined(__AMX_BF16__)
template <>
struct TileRegisters<BFloat16> {
  explicit TileRegisters(int64_t length);
  ~TileRegisters();
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};
#endif

// All rows of one panel.
template <typename T, typename Out>
EFFDET_INLINE void multiply_panel(const TileInput<T>& in, const Epilogue<Out>& out, int64_t rows, int64_t width) {
  if constexpr (kTiles<T>) {
    if (in.low || rows >= kTileRows) return multiply_tiles(in, out, rows, width);
  }
  const int64_t whole = rows / kRows, rest = rows % kRows;
  if (whole) tile<T, Out>(kRows, width)(in, out, 0, whole);
  if (rest) tile<T, Out>(rest, width)(in, out, whole * kRows, 1);
}

// rows x [k] times all of the packed weights [k, channels], into y of `channels` columns.
template <typename T, typename Out>
EFFDET_INLINE void multiply(const TileInput<T>& in, const Epilogue<Out>& out, int64_t rows) {
  const Panels panels(vectors_of<T>(out.channels));
  const int64_t k = in.segment_count * packed_length<T>(in.segment_length);
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t first = panels.start(p), channel = first * kLanes<T>;
    TileInput<T> panel = in;
    panel.weights = static_cast<const char*>(in.weights) + first * k * kPackedBytes<T>;
    Epilogue<Out> part = out;
    part.scale += channel;
    part.shift += channel;
    part.channels = least(out.channels - channel, panels.width(p) * kLanes<T>);
    part.y += channel;
    if (part.residual) part.residual += channel;
    multiply_panel(panel, part, rows, panels.width(p));
  }
}

}  // namespace EFFDET_ISA
}  // namespace effdet
