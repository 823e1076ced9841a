// Arguments of decode_topk on the CPU, checked by bind.cpp; the op is documented in effdet_kernels/ops/decode_topk.
#pragma once

#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/isa.h"

namespace effdet {

// One level of all images: dense maps, with channels inside or, if they are planar, with pixels inside.
struct TopkLevel {
  const void* logits;  // [batch, pixels, anchors * classes]
  const void* codes;   // [batch, pixels, anchors * 4], as (ty, tx, th, tw)
  std::int64_t height, width;
  bool logits_planar, codes_planar;

  std::int64_t pixels() const { return height * width; }
};

struct DecodeTopkCpuParams {
  std::vector<TopkLevel> levels;
  std::int64_t batch, anchors, classes;  // anchors of a location
  std::int64_t kept;                     // of an image
  const void* anchor_boxes;              // [all levels' pixels * anchors, 4] xyxy of the accumulator's type
  const double* grid;                    // in place of them, [levels, anchors, 4]: those of row 0 and column 0
  const double* strides;       // and [levels, 2]: how far (x, y) the anchors of a column or row are from those before
  const void* limits;          // [batch, 2] of the accumulator's type, or null: boxes are not clipped
  void* boxes;                 // [batch, kept, 4] of the accumulator's type
  void* logits;                // [batch, kept]
  std::int64_t* anchor_index;  // [batch, kept]
  std::int64_t* classes_of;    // [batch, kept]
  int dtype;
};

Status decode_topk(const DecodeTopkCpuParams& params, int threads);

// A logit of an image as an unsigned number: its bits in the order of the numbers, then the complement of its place
// among (anchor, class). No two are equal, and the larger comes first. NaN is +infinity, -0 is 0.
__extension__ typedef unsigned __int128 WideEntry;
template <typename T>
struct EntryOf {
  using type = std::uint64_t;
};
template <>
struct EntryOf<double> {
  using type = WideEntry;
};
template <typename T>
using Entry = typename EntryOf<T>::type;

constexpr std::int64_t kMostPlaces = std::int64_t{1} << 32;

// A stretch of a level's map of one image, in the order of the memory.
struct Stretch {
  const void* values;
  std::int64_t first, count;      // of the map's elements
  std::int64_t channels, pixels;  // pixels: 0, or of a planar map
  std::int64_t first_place;       // of the level
};

// Writes the entries of a stretch that are above `least` (any, if it is 0) to `out`; returns how many there are.
EFFDET_PER_ISA(std::int64_t, decode_topk_scan_float, (const Stretch& stretch, std::uint64_t least, std::uint64_t* out))
EFFDET_PER_ISA(std::int64_t, decode_topk_scan_bfloat16,
               (const Stretch& stretch, std::uint64_t least, std::uint64_t* out))
EFFDET_PER_ISA(std::int64_t, decode_topk_scan_double, (const Stretch& stretch, WideEntry least, WideEntry* out))

// Writes rows of an image's outputs, from `begin` to `end`, given its best entries in their order.
EFFDET_PER_ISA(void, decode_topk_decode,
               (const DecodeTopkCpuParams& p, std::int64_t image, const void* entries, std::int64_t begin,
                std::int64_t end))

}  // namespace effdet
