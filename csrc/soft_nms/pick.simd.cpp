// The picks of an image whose candidates lie in tiles. Scores only fall, so a tile takes part from when one of its
// scores could be the highest: most tiles of an image never do. A pick is told to the tiles in whose bounds it is.
// Operations are the reference's, in its order; compiled without fused multiply-adds.
#include "cpu/activation.h"
#include "soft_nms/tiles.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

template <typename T>
constexpr T kGone = -T(__builtin_inff());

// So many tiles that begin to take part together are sorted by place.
constexpr int32_t kSorted = 8;

// Cells of a side of the grid that places are sorted by, and in all.
constexpr int32_t kSide = 32, kCells = kSide * kSide;

// Gaussian: the factor e^(rate iou^2).
template <typename T>
struct Decay {
  T rate, iou_threshold, score_threshold;
};

// e^x; far below 0, where exponential() ends, it is a subnormal number or 0.
template <typename T>
EFFDET_INLINE Vec<T> gaussian(Vec<T> x) {
  constexpr T kLeast = -Exponents<T>::kLargest;
  Vec<T> factor = exponential(lower(x, splat<T>(kLeast)));
  if (any(x < kLeast))
    for (int i = 0; i < kLanes<T>; ++i)
      if (x[i] < kLeast) factor[i] = static_cast<T>(__builtin_exp(x[i]));
  return factor;
}

#if defined(__AVX512F__)
// e^x = 2^n 2^r, n being the integer nearest to x / ln 2; 2^r by the polynomial of sigmoid(). The scaling by 2^n rounds
// to subnormal numbers and to 0.
template <>
EFFDET_INLINE Vec<float> gaussian<float>(Vec<float> x) {
  const Vec<float> y = x * 1.44269504f;
  const Vec<float> n = _mm512_maskz_roundscale_ps(0xffff, y, _MM_FROUND_TO_NEAREST_INT);
  const Vec<float> r = y - n;
  Vec<float> p = _mm512_fmadd_ps(r, splat(1.5353362e-4f), splat(1.3398875e-3f));
  constexpr float kRest[] = {9.618437e-3f, 5.5503324e-2f, 0.24022648f, 0.6931472f, 1.0f};
  for (const float c : kRest) p = _mm512_fmadd_ps(p, r, splat(c));
  return _mm512_maskz_scalef_ps(0xffff, p, n);
}
#endif

// Scores of candidates after a pick that overlaps some of them, by `width` and `height` where both are above 0.
template <typename T, Method kMethod>
EFFDET_INLINE Vec<T> decayed(Vec<T> score, Vec<T> width, Vec<T> height, Vec<T> areas, const Decay<T>& d) {
  const Vec<T> intersection = lower(width, Vec<T>{}) * lower(height, Vec<T>{});
  const Vec<T> total = areas - intersection;
  const Vec<T> iou = total > T(0) ? intersection / total : Vec<T>{};
  auto changes = iou > T(0);
  Vec<T> factor{};
  if constexpr (kMethod == Method::kGaussian) {
    factor = gaussian<T>(iou * iou * d.rate);
  } else {
    changes &= iou > d.iou_threshold;
    if constexpr (kMethod == Method::kLinear) factor = T(1) - iou;
  }
  const Vec<T> product = score * factor;
  const Vec<T> left = ((factor != T(0)) & (product > d.score_threshold)) ? product : splat<T>(kGone<T>);
  return changes ? left : score;
}

template <typename T, Method kMethod>
struct Picker {
  const SoftNmsParams<T>& p;
  const TiledImage<T>& t;
  const T* boxes;  // of the image
  const T* scores;
  Decay<T> decay;

  // Writes a tile that begins to take part, its bounds and its highest score.
  void fill(int32_t tile) const {
    Tile<T>& c = t.candidates[tile];
    for (int lane = 0; lane < kTile; ++lane) {
      const int32_t i = t.order[tile * int64_t{kTile} + lane];
      const T none[4] = {};
      const T* box = i < 0 ? none : boxes + i * int64_t{4};
      c.x0[lane] = box[0];
      c.y0[lane] = box[1];
      c.x1[lane] = box[2];
      c.y1[lane] = box[3];
      c.score[lane] = i < 0 ? kGone<T> : scores[i];
    }
    for (int lane = 0; lane < kTile; lane += kLanes<T>)
      store(c.area + lane, (load(c.x1 + lane) - load(c.x0 + lane)) * (load(c.y1 + lane) - load(c.y0 + lane)));
    const T* rows[4] = {c.x0, c.y0, c.x1, c.y1};
    for (int side = 0; side < 4; ++side) {
      const T sign = side < 2 ? T(-1) : T(1);
      Vec<T> farthest = splat<T>(kGone<T>);
      for (int lane = 0; lane < kTile; lane += kLanes<T>) {
        const Vec<T> value = load(rows[side] + lane) * sign;
        const auto gone = load(c.score + lane) == kGone<T>;
        farthest = (gone | (value < farthest)) ? farthest : value;
      }
      t.bounds[side][tile] = Largest<T>::of(farthest) * sign;
    }
    t.highest[tile] = highest_of(tile);
  }

  // Tells a tile of a pick.
  EFFDET_INLINE void tell_tile(int32_t tile, const T* box) const {
    Tile<T>& c = t.candidates[tile];
    bool changed = false;
    for (int lane = 0; lane < kTile; lane += kLanes<T>) {
      const Vec<T> width = upper(load(c.x1 + lane), splat<T>(box[2])) - lower(load(c.x0 + lane), splat<T>(box[0]));
      const Vec<T> height = upper(load(c.y1 + lane), splat<T>(box[3])) - lower(load(c.y0 + lane), splat<T>(box[1]));
      if (!any((width > T(0)) & (height > T(0)))) continue;
      const Vec<T> areas = load(c.area + lane) + box[4];
      store(c.score + lane, decayed<T, kMethod>(load(c.score + lane), width, height, areas, decay));
      changed = true;
    }
    if (changed) t.highest[tile] = highest_of(tile);
  }

  // Tells those of the tiles from `begin` to `end` whose bounds a pick meets.
  EFFDET_INLINE void tell(int32_t begin, int32_t end, const T* box) const {
    for (int32_t from = begin; from < end; from += kLanes<T>) {
      const Vec<T> left = load(t.bounds[0] + from), top = load(t.bounds[1] + from);
      const Vec<T> width = upper(load(t.bounds[2] + from), splat<T>(box[2])) - lower(left, splat<T>(box[0]));
      const Vec<T> height = upper(load(t.bounds[3] + from), splat<T>(box[3])) - lower(top, splat<T>(box[1]));
      const auto there = load(t.highest + from) != kGone<T>;
      unsigned tiles = lanes_before(end - from, (width > T(0)) & (height > T(0)) & there);
      for (; tiles != 0; tiles &= tiles - 1) tell_tile(from + __builtin_ctz(tiles), box);
    }
  }

  EFFDET_INLINE T highest_of(int32_t tile) const {
    const T* score = t.candidates[tile].score;
    Vec<T> highest = load(score);
    for (int lane = kLanes<T>; lane < kTile; lane += kLanes<T>) {
      const Vec<T> other = load(score + lane);
      highest = other > highest ? other : highest;
    }
    return Largest<T>::of(highest);
  }

  // The largest of `count` numbers, behind which there are vectors of -infinity or of numbers that count as well.
  static EFFDET_INLINE T largest(const T* from, int32_t count) {
    Vec<T> highest = splat<T>(kGone<T>);
    int32_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) {
      const Vec<T> value = load(from + i);
      highest = value > highest ? value : highest;
    }
    T found = Largest<T>::of(highest);
    for (; i < count; ++i) found = most(found, from[i]);
    return found;
  }

  // Lets tiles of a group take part until no other can have a higher score, or the same: first one, then each time as
  // many as do.
  void complete(Group<T>* group) const {
    while (group->next < group->end && t.highest[group->next] >= group->highest) {
      const int32_t begin = group->next, end = least(group->end, most(begin + 1, 2 * begin - group->begin));
      if (end - begin >= kSorted) sort_by_place(begin, end);
      for (int32_t tile = begin; tile < end; ++tile) fill(tile);
      for (int32_t pick = group->first_pick; pick != kNoPick; pick = t.next_pick[pick])
        tell(begin, end, t.picks + pick * int64_t{5});
      group->highest = most(group->highest, largest(t.highest + begin, end - begin));
      group->next = end;
    }
  }

  // Puts candidates that are close together into one tile: sorts those of some tiles along a Z-order curve.
  void sort_by_place(int32_t begin, int32_t end) const {
    int32_t* order = t.order + begin * int64_t{kTile};
    int32_t count = (end - begin) * kTile;
    while (order[count - 1] < 0) --count;
    const auto middle = [this](int32_t i, int axis) {  // halved, so that no difference is infinite
      const T* box = boxes + i * int64_t{4} + axis;
      return box[0] / 4 + box[2] / 4;
    };
    T lowest[2], scale[2];
    for (int axis = 0; axis < 2; ++axis) {
      T highest = lowest[axis] = middle(order[0], axis);
      for (int32_t k = 1; k < count; ++k) {
        const T value = middle(order[k], axis);
        lowest[axis] = least(lowest[axis], value);
        highest = most(highest, value);
      }
      const T per_pixel = T(kSide - 1) / (highest - lowest[axis]);
      scale[axis] = per_pixel < -kGone<T> ? per_pixel : T(0);
    }
    const auto spread = [](int32_t v) {  // a 0 before each of 5 bits
      v = (v | v << 4) & 0x10f;
      v = (v | v << 2) & 0x133;
      return (v | v << 1) & 0x155;
    };
    const auto cell = [&](int32_t i) {
      const auto column = static_cast<int32_t>((middle(i, 0) - lowest[0]) * scale[0]);
      const auto row = static_cast<int32_t>((middle(i, 1) - lowest[1]) * scale[1]);
      return spread(column) | spread(row) << 1;
    };
    int32_t next[kCells + 1] = {};
    for (int32_t k = 0; k < count; ++k) ++next[cell(order[k]) + 1];
    for (int32_t c = 0; c < kCells; ++c) next[c + 1] += next[c];
    for (int32_t k = 0; k < count; ++k) t.spare[next[cell(order[k])]++] = order[k];
    __builtin_memcpy(order, t.spare, count * sizeof(int32_t));
  }

  struct Best {
    int64_t index = -1;  // of the candidate
    int32_t group, tile, lane;
  };

  // The lanes in which a comparison's result is true, of the first `count`.
  template <typename M>
  static EFFDET_INLINE unsigned lanes_before(int32_t count, M mask) {
    return lanes_of(mask) & (count < kLanes<T> ? (1u << count) - 1 : ~0u);
  }

  // The candidate of the lowest index of those of a tile that have the score `highest`, if it is lower than the best's.
  void find_in_tile(int32_t group, int32_t tile, T highest, Best* best) const {
    for (int32_t from = 0; from < kTile; from += kLanes<T>) {
      unsigned lanes = lanes_of(load(t.candidates[tile].score + from) == highest);
      for (; lanes != 0; lanes &= lanes - 1) {
        const int32_t lane = from + __builtin_ctz(lanes);
        const int32_t index = t.order[tile * int64_t{kTile} + lane];
        if (best->index < 0 || index < best->index) *best = {index, group, tile, lane};
      }
    }
  }

  // The same of a group, of which it was not known whether it has that score.
  void find_in_group(int32_t g, T highest, Best* best) const {
    Group<T>& group = t.group[g];
    complete(&group);
    t.group_highest[g] = group.highest;
    if (group.highest != highest) return;
    for (int32_t from = group.begin; from < group.next; from += kLanes<T>) {
      unsigned lanes = lanes_before(group.next - from, load(t.highest + from) == highest);
      for (; lanes != 0; lanes &= lanes - 1) find_in_tile(g, from + __builtin_ctz(lanes), highest, best);
    }
  }

  // The next pick, given what no score is above: of equal ones that of the lowest index. None where no score is that
  // high, which then is known of its group.
  Best best_of(T highest) const {
    Best best;
    for (int32_t from = 0; from < t.groups; from += kLanes<T>) {
      unsigned lanes = lanes_before(t.groups - from, load(t.group_highest + from) == highest);
      for (; lanes != 0; lanes &= lanes - 1) find_in_group(from + __builtin_ctz(lanes), highest, &best);
    }
    return best;
  }

  // Takes a pick out, and tells its group.
  void take(int32_t pick, const Best& best) const {
    Tile<T>& c = t.candidates[best.tile];
    T* box = t.picks + pick * int64_t{5};
    box[0] = c.x0[best.lane];
    box[1] = c.y0[best.lane];
    box[2] = c.x1[best.lane];
    box[3] = c.y1[best.lane];
    box[4] = c.area[best.lane];
    c.score[best.lane] = kGone<T>;
    t.highest[best.tile] = highest_of(best.tile);
    Group<T>& group = t.group[best.group];
    (group.last_pick == kNoPick ? group.first_pick : t.next_pick[group.last_pick]) = pick;
    t.next_pick[pick] = kNoPick;
    group.last_pick = pick;
    if (p.max_per_class > 0 && --group.picks_left == 0) {
      t.group_highest[best.group] = kGone<T>;
      return;
    }
    tell(group.begin, group.next, box);
    group.highest = largest(t.highest + group.begin, group.next - group.begin);
    const T others = group.next < group.end ? t.highest[group.next] : kGone<T>;
    t.group_highest[best.group] = most(group.highest, others);
  }

  int64_t run(int64_t image, T above) const {
    const int64_t most_picks = least(p.max_det, p.count);
    int64_t found = 0;
    while (found < most_picks) {
      const T highest = largest(t.group_highest, t.groups);
      if (!(highest > above)) break;
      const Best best = best_of(highest);
      if (best.index < 0) continue;
      p.index[image * p.max_det + found] = best.index;
      p.score[image * p.max_det + found] = highest;
      take(static_cast<int32_t>(found++), best);
    }
    return found;
  }
};

template <typename T, Method kMethod>
int64_t run(const SoftNmsParams<T>& p, int64_t image, const TiledImage<T>& t, T above) {
  const Decay<T> decay{T(-1) / p.sigma, p.iou_threshold, p.score_threshold};
  return Picker<T, kMethod>{p, t, p.boxes + image * p.count * 4, p.scores + image * p.count, decay}.run(image, above);
}

template <typename T>
int64_t pick(const SoftNmsParams<T>& p, int64_t image, const TiledImage<T>& t, T above) {
  if (p.method == Method::kGaussian) return run<T, Method::kGaussian>(p, image, t, above);
  if (p.method == Method::kLinear) return run<T, Method::kLinear>(p, image, t, above);
  return run<T, Method::kHard>(p, image, t, above);
}

}  // namespace

int64_t soft_nms_pick_float(const SoftNmsParams<float>& p, int64_t image, const TiledImage<float>& t, float above) {
  return pick(p, image, t, above);
}

int64_t soft_nms_pick_double(const SoftNmsParams<double>& p, int64_t image, const TiledImage<double>& t, double above) {
  return pick(p, image, t, above);
}

}  // namespace EFFDET_ISA
}  // namespace effdet
