// What the steps of label_anchors hand on to each other, in memory of the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace effdet {

constexpr std::int64_t kLabelBlock = 128;  // anchors, one after another, that a box meets together or not at all
constexpr std::int64_t kMostLabelLanes = 16;

// What all anchors of a block have in common; each array holds the blocks of a part one after another.
template <typename T>
struct LabelBounds {
  T *left, *top, *right, *bottom;  // the rectangle around them
  T *widest, *tallest;
  T* smallest;  // area
};

template <typename T>
struct LabelWorkspace {
  std::int64_t parts, blocks;
  std::int64_t
      slots;  // blocks of a part, and more to fill the last vector. Block b is number b / parts of part b % parts
  LabelBounds<T> bounds;
  T* sides[4];             // [blocks * kLabelBlock], of anchors: x1, y1, x2, y2
  T* areas;                // [blocks * kLabelBlock]
  std::int64_t* real;      // [batch, count]: the boxes that are no padding
  std::int64_t* reals;     // [batch]: how many
  T* claimed_iou;          // [batch, parts, count]: the largest IoU of a box
  std::int64_t* claimed;   // [batch, parts, count]: and its anchor
  unsigned char* matched;  // [batch, blocks]: whether an anchor of the block has a box

  // Inlined everywhere: no function of one instruction set may serve another.
  __attribute__((always_inline)) LabelWorkspace(void* base, std::int64_t batch, std::int64_t count, std::int64_t total,
                                                std::int64_t parts_)
      : parts(parts_), blocks((total + kLabelBlock - 1) / kLabelBlock), at_(reinterpret_cast<std::size_t>(base)) {
    slots = ((blocks + parts - 1) / parts + kMostLabelLanes - 1) / kMostLabelLanes * kMostLabelLanes;
    T** const arrays[] = {&bounds.left,   &bounds.top,     &bounds.right,   &bounds.bottom,
                          &bounds.widest, &bounds.tallest, &bounds.smallest};
    for (T** array : arrays) take(array, parts * slots);
    for (T*& side : sides) take(&side, blocks * kLabelBlock);
    take(&areas, blocks * kLabelBlock);
    take(&real, batch * count);
    take(&reals, batch);
    take(&claimed_iou, batch * parts * count);
    take(&claimed, batch * parts * count);
    take(&matched, batch * blocks);
  }

  // The end of the memory.
  __attribute__((always_inline)) std::size_t end() const { return at_; }

 private:
  template <typename U>
  __attribute__((always_inline)) void take(U** array, std::int64_t elements) {
    *array = reinterpret_cast<U*>(at_);
    at_ += (static_cast<std::size_t>(elements) * sizeof(U) + 63) / 64 * 64;
  }

  std::size_t at_;
};

inline std::int64_t label_workspace_bytes(int dtype, std::int64_t batch, std::int64_t count, std::int64_t total,
                                          std::int64_t parts) {
  return static_cast<std::int64_t>(dtype == kFloat64
                                       ? LabelWorkspace<double>(nullptr, batch, count, total, parts).end()
                                       : LabelWorkspace<float>(nullptr, batch, count, total, parts).end());
}

}  // namespace effdet
