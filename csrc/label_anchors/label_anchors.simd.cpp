// IoU matching. Anchors next to each other lie next to each other in the image: a box is compared with what a block of
// them has in common, which bounds its IoU with each, and then with the anchors of few blocks. Operations that decide
// are the reference's, in its order; compiled without fused multiply-adds. Bounds are of the rounded numbers: rounding
// keeps order.
#include "common/parallel_for.h"
#include "common/scratch.h"
#include "cpu/activation.h"
#include "label_anchors/params.h"
#include "label_anchors/workspace.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

template <typename T>
struct Float;
template <>
struct Float<float> {
  using Bits = std::uint32_t;
  static constexpr float kLeast = 1.17549435e-38f, kSlack = 1 + 4e-6f;  // kSlack: more than a quotient's roundings
  static EFFDET_INLINE float log(float x) { return __builtin_logf(x); }
};
template <>
struct Float<double> {
  using Bits = std::uint64_t;
  static constexpr double kLeast = 2.2250738585072014e-308, kSlack = 1 + 1e-14;
  static EFFDET_INLINE double log(double x) { return __builtin_log(x); }
};

// The largest number below x, for x above 0; else 0.
template <typename T>
EFFDET_INLINE T below(T x) {
  using Bits = typename Float<T>::Bits;
  return x > T(0) ? bit_cast<T>(static_cast<Bits>(bit_cast<Bits>(x) - 1)) : T(0);
}

template <typename T>
struct Box {
  Vec<T> x1, y1, x2, y2, area;

  EFFDET_INLINE explicit Box(const T* box)
      : x1(splat(box[0])),
        y1(splat(box[1])),
        x2(splat(box[2])),
        y2(splat(box[3])),
        area(splat((box[2] - box[0]) * (box[3] - box[1]))) {}
  EFFDET_INLINE Vec<T> width(const T* left, const T* right) const {
    return lower(upper(load(right), x2) - lower(load(left), x1), Vec<T>{});
  }
  EFFDET_INLINE Vec<T> height(const T* top, const T* bottom) const {
    return lower(upper(load(bottom), y2) - lower(load(top), y1), Vec<T>{});
  }
};

// The arrays of one block's anchors, padded with anchors that meet no box, and their bounds.
template <typename T>
void prepare_block(const LabelAnchorsParams& p, const LabelWorkspace<T>& w, int64_t block) {
  const int64_t first = block * kLabelBlock, count = least(kLabelBlock, p.total - first);
  const T* anchors = static_cast<const T*>(p.anchors) + first * 4;
  T *x1 = w.sides[0] + first, *y1 = w.sides[1] + first, *x2 = w.sides[2] + first, *y2 = w.sides[3] + first;
  for (int64_t i = 0; i < count; ++i) {
    x1[i] = anchors[4 * i];
    y1[i] = anchors[4 * i + 1];
    x2[i] = anchors[4 * i + 2];
    y2[i] = anchors[4 * i + 3];
  }
  constexpr T kInfinity = T(__builtin_inff());
  T left = kInfinity, top = kInfinity, right = -kInfinity, bottom = -kInfinity;
  T widest = T(0), tallest = T(0), smallest = kInfinity;
  for (int64_t i = 0; i < count; ++i) {
    const T width = x2[i] - x1[i], height = y2[i] - y1[i], area = width * height;
    w.areas[first + i] = area;
    left = x1[i] < left ? x1[i] : left;
    top = y1[i] < top ? y1[i] : top;
    right = x2[i] > right ? x2[i] : right;
    bottom = y2[i] > bottom ? y2[i] : bottom;
    widest = width > widest ? width : widest;
    tallest = height > tallest ? height : tallest;
    smallest = area < smallest ? area : smallest;
  }
  for (int64_t i = count; i < kLabelBlock; ++i) x1[i] = y1[i] = x2[i] = y2[i] = w.areas[first + i] = T(0);
  const int64_t at = block % w.parts * w.slots + block / w.parts;
  const LabelBounds<T>& b = w.bounds;
  b.left[at] = left, b.top[at] = top, b.right[at] = right, b.bottom[at] = bottom;
  b.widest[at] = widest, b.tallest[at] = tallest, b.smallest[at] = smallest;
}

// Slots without a block: no box meets them.
template <typename T>
void prepare_empty_slots(const LabelWorkspace<T>& w) {
  const LabelBounds<T>& b = w.bounds;
  for (int64_t part = 0; part < w.parts; ++part)
    for (int64_t slot = divide_up(w.blocks - part, w.parts); slot < w.slots; ++slot)
      b.left[part * w.slots + slot] = b.right[part * w.slots + slot] = b.widest[part * w.slots + slot] = T(0);
}

// Lists an image's real boxes; false if one of them is not finite.
template <typename T>
bool list_boxes(const LabelAnchorsParams& p, const LabelWorkspace<T>& w, int64_t image) {
  const T* box = static_cast<const T*>(p.boxes) + image * p.count * 4;
  const int64_t* classes = p.classes + image * p.count;
  int64_t* real = w.real + image * p.count;
  int64_t found = 0;
  T zero = T(0);  // a NaN where a number is not finite
  for (int64_t m = 0; m < p.count; ++m, box += 4) {
    if (classes[m] < 0) continue;
    real[found++] = m;
    zero += box[0] * T(0) + box[1] * T(0) + (box[2] * T(0) + box[3] * T(0));
  }
  w.reals[image] = found;
  return zero == T(0);
}

template <typename T>
struct Claim {
  T iou;
  int64_t anchor;
};

// One image and the blocks of one part.
template <typename T>
struct Matcher {
  static constexpr int kL = kLanes<T>;
  const LabelAnchorsParams& p;
  const LabelWorkspace<T>& w;
  int64_t image, part, blocks;
  T threshold;
  T floor;   // the number below the threshold, or 0: an anchor takes no box of an IoU that is not above
  T* best;   // [blocks, kLabelBlock]: of each anchor, the largest IoU above the floor, or the floor
  T* reach;  // [slots]: no anchor of the block has a larger IoU with the box at hand; -1: none meets it

  EFFDET_INLINE int64_t block(int64_t slot) const { return part + slot * w.parts; }

  // Background everywhere; at threshold 0 the first box.
  void fill() const {
    const bool all = threshold == T(0) && w.reals[image] > 0;
    for (int64_t slot = 0; slot < blocks; ++slot) {
      const int64_t first = block(slot) * kLabelBlock, count = least(kLabelBlock, p.total - first);
      int64_t* labels = p.labels + image * p.total + first;
      std::memset(labels, 0xff, static_cast<std::size_t>(count) * sizeof(int64_t));
      std::memset(static_cast<T*>(p.codes) + (image * p.total + first) * 4, 0,
                  static_cast<std::size_t>(count) * 4 * sizeof(T));
      if (all)
        for (int64_t i = 0; i < count; ++i) labels[i] = w.real[image * p.count];
      w.matched[image * w.blocks + block(slot)] = all;
    }
    for (int64_t i = 0; i < blocks * kLabelBlock; i += kL) store(best + i, splat(floor));
  }

  // Sets `reach` for a box; returns the slot of the largest, or -1 if all are -1. The overlap is at most `most_` of the
  // area, of the box and of every anchor.
  EFFDET_INLINE int64_t bound(const Box<T>& box) const {
    const LabelBounds<T>& b = w.bounds;
    const int64_t at = part * w.slots;
    Vec<T> highest = splat(T(-1));
    for (int64_t i = 0; i < w.slots; i += kL) {
      const Vec<T> width = upper(box.width(b.left + at + i, b.right + at + i), load(b.widest + at + i));
      const Vec<T> height = upper(box.height(b.top + at + i, b.bottom + at + i), load(b.tallest + at + i));
      const Vec<T> most_ = width * height;
      Vec<T> share = splat(T(-1));
      if (any(most_ > T(0))) {
        const Vec<T> rest = lower(load(b.smallest + at + i) - most_, Vec<T>{});
        share = most_ / (box.area + rest) * Float<T>::kSlack + Float<T>::kLeast;
        share = share == share ? share : splat(T(__builtin_inff()));
        share = most_ > T(0) ? share : splat(T(-1));
      }
      store(reach + i, share);
      highest = lower(highest, share);
    }
    const T found = Largest<T>::of(highest);
    if (found < T(0)) return -1;
    int64_t slot = 0;
    while (reach[slot] != found) ++slot;
    return slot;
  }

  // Compares box m with the anchors of a block. Quotients are made only where one could matter: a share is above s, or
  // is s and s is above 0, only if the overlap is at least the rounded product of the union and the number below s.
  void visit(int64_t slot, const Box<T>& box, int64_t m, Claim<T>* claim) const {
    const int64_t first = block(slot) * kLabelBlock;
    for (int64_t i = 0; i < kLabelBlock; i += kL) {
      const int64_t at = first + i;
      const Vec<T> width = box.width(w.sides[0] + at, w.sides[2] + at);
      const Vec<T> height = box.height(w.sides[1] + at, w.sides[3] + at);
      const Vec<T> overlap = width * height, all = box.area + load(w.areas + at) - overlap;
      T* best_ = best + slot * kLabelBlock + i;
      const Vec<T> before = load(best_), matters = upper(before, splat(below(claim->iou)));
      if (lanes_of((overlap > T(0)) & (overlap >= all * matters)) == 0) continue;
      Vec<T> iou = overlap / all;
      iou = ((overlap > T(0)) & (iou > T(0))) ? iou : Vec<T>{};
      unsigned taken = lanes_of(iou > before);
      if (taken != 0) {
        store(best_, lower(before, iou));
        w.matched[image * w.blocks + block(slot)] = 1;
        int64_t* labels = p.labels + image * p.total + at;
        for (; taken != 0; taken &= taken - 1) labels[__builtin_ctz(taken)] = m;
      }
      const T highest = Largest<T>::of(iou);
      if (highest < claim->iou || highest == T(0)) continue;
      const int64_t anchor = at + __builtin_ctz(lanes_of(iou == splat(highest)));
      if (highest > claim->iou || anchor < claim->anchor) *claim = {highest, anchor};
    }
  }

  // The best block first: what it holds leaves little for the others to be compared for.
  Claim<T> match(int64_t m) const {
    const Box<T> box(static_cast<const T*>(p.boxes) + (image * p.count + m) * 4);
    Claim<T> claim{T(0), 0};
    const int64_t first = bound(box);
    if (first < 0) return claim;
    visit(first, box, m, &claim);
    reach[first] = T(-1);
    for (int64_t i = 0; i < w.slots; i += kL) {
      unsigned lanes = lanes_of(load(reach + i) >= splat(least(floor, claim.iou)));
      for (; lanes != 0; lanes &= lanes - 1) {
        const int64_t slot = i + __builtin_ctz(lanes);
        if (reach[slot] >= least(floor, claim.iou)) visit(slot, box, m, &claim);
      }
    }
    return claim;
  }

  void run() const {
    fill();
    const int64_t at = (image * w.parts + part) * p.count;
    for (int64_t r = 0; r < w.reals[image]; ++r) {
      const Claim<T> claim = match(w.real[image * p.count + r]);
      w.claimed_iou[at + r] = claim.iou;
      w.claimed[at + r] = claim.anchor;
    }
  }
};

// The anchor that an image's real box r claims: of equal ones the first.
template <typename T>
int64_t claimed_by(const LabelAnchorsParams& p, const LabelWorkspace<T>& w, int64_t image, int64_t r) {
  Claim<T> claim{T(0), 0};
  for (int64_t part = 0; part < w.parts; ++part) {
    const int64_t at = (image * w.parts + part) * p.count + r;
    const T iou = w.claimed_iou[at];
    if (iou > claim.iou || (iou == claim.iou && iou > T(0) && w.claimed[at] < claim.anchor))
      claim = {iou, w.claimed[at]};
  }
  return claim.anchor;
}

template <typename T>
EFFDET_INLINE void encode(const T* box, const T* anchor, T* code) {
  constexpr T kEps = static_cast<T>(1e-7);
  for (int side = 0; side < 2; ++side) {
    const T size = box[side + 2] - box[side], base = anchor[side + 2] - anchor[side];
    code[1 - side] = (box[side] + size / 2 - (anchor[side] + base / 2)) / (base + kEps);
    code[3 - side] = Float<T>::log((size + kEps) / (base + kEps));
  }
}

// Claims over matches, then classes and codes for the boxes' numbers in `labels`.
template <typename T>
void finish(const LabelAnchorsParams& p, const LabelWorkspace<T>& w, int64_t image) {
  int64_t* labels = p.labels + image * p.total;
  for (int64_t r = w.reals[image] - 1; r >= 0; --r) {  // the first comes last, and stays
    const int64_t anchor = claimed_by(p, w, image, r);
    labels[anchor] = w.real[image * p.count + r];
    w.matched[image * w.blocks + anchor / kLabelBlock] = 1;
  }
  int64_t found = 0;
  for (int64_t block = 0; block < w.blocks; ++block) {
    if (!w.matched[image * w.blocks + block]) continue;
    for (int64_t i = block * kLabelBlock; i < least((block + 1) * kLabelBlock, p.total); ++i) {
      if (labels[i] < 0) continue;
      const int64_t m = image * p.count + labels[i];
      encode(static_cast<const T*>(p.boxes) + m * 4, static_cast<const T*>(p.anchors) + i * 4,
             static_cast<T*>(p.codes) + (image * p.total + i) * 4);
      labels[i] = p.classes[m] - 1;
      ++found;
    }
  }
  static_cast<T*>(p.positives)[image] = static_cast<T>(found);
}

template <typename T>
Status run(const LabelAnchorsParams& p, int threads) {
  constexpr int64_t kTogether = 16;  // blocks that are prepared together
  const LabelWorkspace<T> w(p.workspace, p.batch, p.count, p.total, p.parts);
  *p.infinite = 0;
  for (int64_t image = 0; image < p.batch; ++image)
    if (!list_boxes(p, w, image)) *p.infinite = 1;
  if (*p.infinite) return kOk;
  prepare_empty_slots(w);
  parallel_for(divide_up(w.blocks, kTogether), threads, [&](int64_t i) {
    for (int64_t block = i * kTogether; block < least((i + 1) * kTogether, w.blocks); ++block)
      prepare_block(p, w, block);
  });
  const T threshold = static_cast<T>(least(p.threshold, 2.0));  // no IoU is above 2
  bool enough_memory = true;
  parallel_for(p.batch * p.parts, threads, [&](int64_t i) {
    const int64_t image = i / p.parts, part = i % p.parts, blocks = divide_up(w.blocks - part, p.parts);
    auto* best = static_cast<T*>(thread_scratch(static_cast<std::size_t>(blocks * kLabelBlock + w.slots) * sizeof(T)));
    if (!best) {
      __atomic_store_n(&enough_memory, false, __ATOMIC_RELAXED);
      return;
    }
    Matcher<T>{p, w, image, part, blocks, threshold, below(threshold), best, best + blocks * kLabelBlock}.run();
  });
  if (!enough_memory) return kOutOfMemory;
  parallel_for(p.batch, threads, [&](int64_t image) { finish(p, w, image); });
  return kOk;
}

}  // namespace

Status label_anchors(const LabelAnchorsParams& p, int threads) {
  if (p.dtype == kFloat32) return run<float>(p, threads);
  if (p.dtype == kFloat64) return run<double>(p, threads);
  return kBadDtype;
}

}  // namespace EFFDET_ISA
}  // namespace effdet
