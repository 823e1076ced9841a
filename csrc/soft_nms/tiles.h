// What of an image cpu.cpp hands to pick.simd.cpp: its candidates in tiles, and memory for the picks.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "soft_nms/params.h"

namespace effdet {

constexpr int kTile = 16;  // candidates; whole vectors of each instruction set

// Candidates of one class, a row for each number.
template <typename T>
struct alignas(64) Tile {
  T x0[kTile], y0[kTile], x1[kTile], y1[kTile], area[kTile];
  T score[kTile];  // -infinity: gone, or none
};

constexpr std::int32_t kNoPick = -1;

// A class, whose candidates are those of the tiles from `begin` to `end`. The tiles before `next` take part: their
// scores take all picks of the class into account. The others are about in the order of their scores. Picks are
// numbered in their order.
template <typename T>
struct Group {
  std::int32_t begin, end, next;
  std::int32_t first_pick, last_pick;
  T highest;  // score of the tiles that take part
  std::int64_t picks_left;
};

template <typename T>
struct TiledImage {
  std::int32_t tiles, groups;
  std::int32_t* order;      // [tiles, kTile] candidates, -1: none
  Tile<T>* candidates;      // [tiles], written when they begin to take part
  T* bounds[4];             // [tiles, to whole vectors] each: the box around a tile's, written with it
  T* highest;               // [tiles, to whole vectors] score; of tiles that take no part yet: of this or a later one
  Group<T>* group;          // [groups]
  T* group_highest;         // [groups, to whole vectors] score, or more: of the tiles that take no part as well
  T* picks;                 // [min(max_det, candidates), 5]: box and area
  std::int32_t* next_pick;  // [min(max_det, candidates)] of its group
  std::int32_t* spare;      // [candidates]
};

// Writes the image's rows of `index` and `score` as long as scores are above `above`; returns how many picks there are.
EFFDET_PER_ISA(std::int64_t, soft_nms_pick_float,
               (const SoftNmsParams<float>& p, std::int64_t image, const TiledImage<float>& t, float above))
EFFDET_PER_ISA(std::int64_t, soft_nms_pick_double,
               (const SoftNmsParams<double>& p, std::int64_t image, const TiledImage<double>& t, double above))

}  // namespace effdet
