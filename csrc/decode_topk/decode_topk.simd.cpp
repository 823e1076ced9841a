// What decode_topk does with each logit, and with each of the best: cpu.cpp does the rest.
#include "cpu/activation.h"
#include "decode_topk/cpu_params.h"

namespace effdet {
namespace EFFDET_ISA {
namespace {

template <typename A>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = std::uint32_t;
};
template <>
struct BitsOf<double> {
  using type = std::uint64_t;
};
template <typename A>
using Bits = typename BitsOf<A>::type;

template <typename A>
constexpr Bits<A> kSign = Bits<A>(1) << (8 * sizeof(A) - 1);

template <typename T>
EFFDET_INLINE Entry<T> entry_of(Acc<T> value, int64_t place) {
  using A = Acc<T>;
  const A number = value == value ? value + A(0) : A(__builtin_inff());
  const auto bits = bit_cast<Bits<A>>(number);
  const Bits<A> key = bits & kSign<A> ? ~bits : bits | kSign<A>;
  return static_cast<Entry<T>>(key) << 32 | static_cast<std::uint32_t>(~static_cast<std::uint32_t>(place));
}

template <typename T>
EFFDET_INLINE Acc<T> value_of(Entry<T> entry) {
  using A = Acc<T>;
  const auto key = static_cast<Bits<A>>(entry >> 32);
  return bit_cast<A>(key & kSign<A> ? key ^ kSign<A> : ~key);
}

// A number that T holds.
template <typename T>
EFFDET_INLINE T narrow(Acc<T> value) {
  if constexpr (sizeof(T) == 2) {
    return {static_cast<std::uint16_t>(bit_cast<std::uint32_t>(value) >> 16)};
  } else {
    return value;
  }
}

template <typename T>
EFFDET_INLINE std::uint32_t place_of(Entry<T> entry) {
  return ~static_cast<std::uint32_t>(entry);
}

// (anchor, class) has its place in the order of pixels and channels, wherever it is in memory.
EFFDET_INLINE int64_t place_in(const Stretch& s, int64_t element) {
  if (s.pixels == 0) return s.first_place + element;
  return s.first_place + element % s.pixels * s.channels + element / s.pixels;
}

template <typename T>
int64_t scan(const Stretch& s, Entry<T> least_, Entry<T>* out) {
  using A = Acc<T>;
  const T* values = static_cast<const T*>(s.values);
  const A bound = least_ == 0 ? -A(__builtin_inff()) : value_of<T>(least_);
  int64_t found = 0;
  const auto note = [&](int64_t i) {
    const Entry<T> entry = entry_of<T>(widen(values[i]), place_in(s, s.first + i));
    out[found] = entry;
    found += entry > least_;
  };
  constexpr int64_t kStep = 4 * kLanes<T>;
  int64_t i = 0;
  for (; i + kStep <= s.count; i += kStep) {
    Vec<A> vectors[4];
    for (int v = 0; v < 4; ++v) vectors[v] = load(values + i + v * kLanes<T>);
    const auto below = (vectors[0] < bound) & (vectors[1] < bound) & (vectors[2] < bound) & (vectors[3] < bound);
    if (!any(~below)) continue;  // a NaN stays
    std::uint64_t lanes = 0;
    for (int v = 0; v < 4; ++v) lanes |= std::uint64_t{lanes_of(~(vectors[v] < bound))} << v * kLanes<T>;
    for (; lanes != 0; lanes &= lanes - 1) note(i + __builtin_ctzll(lanes));
  }
  for (; i < s.count; ++i)
    if (!(widen(values[i]) < bound)) note(i);
  return found;
}

// Where numbers of all sizes come: infinite above the range, 0 below, a NaN stays.
template <typename A>
EFFDET_INLINE Vec<A> any_exponential(Vec<A> x) {
  const Vec<A> most_ = splat<A>(Exponents<A>::kLargest);
  Vec<A> y = exponential(upper(lower(x, -most_), most_));
  if (any((x > most_) | (x < -most_)))
    for (int i = 0; i < kLanes<A>; ++i)
      if (x[i] > most_[i] || x[i] < -most_[i]) y[i] = static_cast<A>(__builtin_exp(static_cast<double>(x[i])));
  return y;
}

// Numbers of some picks, one in each lane.
template <typename A>
struct Lanes {
  alignas(64) A code[4][kLanes<A>];    // ty, tx, th, tw
  alignas(64) A anchor[4][kLanes<A>];  // xyxy
  alignas(64) A box[4][kLanes<A>];
};

// Both sides of boxes along x (0) or y (1).
template <typename A>
EFFDET_INLINE void decode_side(Lanes<A>* lanes, int side, const A* limits) {
  const Vec<A> low = load(lanes->anchor[side]), high = load(lanes->anchor[side + 2]);
  const Vec<A> size = high - low;
  const Vec<A> centre = load(lanes->code[1 - side]) * size + (low + high) * A(0.5);
  const Vec<A> half = any_exponential<A>(load(lanes->code[3 - side])) * size * A(0.5);
  for (int end = 0; end < 2; ++end) {
    Vec<A> x = end == 0 ? centre - half : centre + half;
    if (limits) {
      const Vec<A> limit = splat<A>(limits[side]);
      x = lower(x, Vec<A>{});
      x = ((x > limit) | (limit != limit)) ? limit : x;
    }
    store(lanes->box[side + 2 * end], x);
  }
}

// An entry's logit: its bits, but for -0, or a NaN where they say +infinity.
template <typename T>
EFFDET_INLINE T logit_of(Entry<T> entry, const TopkLevel& l, int64_t image, int64_t pixel, int64_t channel,
                         int64_t channels) {
  const Acc<T> value = value_of<T>(entry);
  if (value != Acc<T>(0) && value < Acc<T>(__builtin_inff())) return narrow<T>(value);
  const int64_t at = l.logits_planar ? channel * l.pixels() + pixel : pixel * channels + channel;
  return static_cast<const T*>(l.logits)[image * l.pixels() * channels + at];
}

template <typename T>
void decode(const DecodeTopkCpuParams& p, int64_t image, const Entry<T>* entries, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A* limits = p.limits ? static_cast<const A*>(p.limits) + 2 * image : nullptr;
  A* boxes = static_cast<A*>(p.boxes) + image * p.kept * 4;
  T* logits = static_cast<T*>(p.logits) + image * p.kept;
  std::int64_t* anchor_index = p.anchor_index + image * p.kept;
  std::int64_t* classes_of = p.classes_of + image * p.kept;
  const auto anchors = static_cast<std::uint32_t>(p.anchors), classes = static_cast<std::uint32_t>(p.classes);
  for (int64_t from = begin; from < end; from += kLanes<T>) {
    const int count = static_cast<int>(least<int64_t>(kLanes<T>, end - from));
    Lanes<A> lanes{};
    const T* code[4][kLanes<T>];
    for (int i = 0; i < count; ++i) {
      const std::uint32_t place = place_of<T>(entries[from + i]);
      const std::uint32_t anchor = place / classes, label = place - anchor * classes;
      anchor_index[from + i] = anchor;
      classes_of[from + i] = label;
      std::size_t level = 0;
      std::uint32_t local = anchor;  // its number in the level
      for (; local >= p.levels[level].pixels() * anchors; ++level) local -= p.levels[level].pixels() * anchors;
      const TopkLevel& l = p.levels[level];
      const std::uint32_t pixel = local / anchors, a = local - pixel * anchors;
      const int64_t pixels = l.pixels();
      logits[from + i] = logit_of<T>(entries[from + i], l, image, pixel, a * classes + label, anchors * classes);
      const T* codes = static_cast<const T*>(l.codes) + image * pixels * anchors * 4;
      const int64_t first = l.codes_planar ? a * 4 * pixels + pixel : int64_t{local} * 4;
      for (int side = 0; side < 4; ++side) {
        code[side][i] = codes + first + side * (l.codes_planar ? pixels : 1);
        __builtin_prefetch(code[side][i]);
      }
      if (p.grid) {
        const double* corner = p.grid + (level * anchors + a) * 4;
        const auto width = static_cast<std::uint32_t>(l.width);
        const std::uint32_t row = pixel / width, column = pixel - row * width;
        const double moved[2] = {column * p.strides[2 * level], row * p.strides[2 * level + 1]};
        for (int side = 0; side < 4; ++side) lanes.anchor[side][i] = static_cast<A>(corner[side] + moved[side % 2]);
      } else {
        for (int side = 0; side < 4; ++side)
          lanes.anchor[side][i] = static_cast<const A*>(p.anchor_boxes)[anchor * int64_t{4} + side];
      }
    }
    for (int i = 0; i < count; ++i)
      for (int side = 0; side < 4; ++side) lanes.code[side][i] = widen(*code[side][i]);
    decode_side(&lanes, 0, limits);
    decode_side(&lanes, 1, limits);
    for (int i = 0; i < count; ++i)
      for (int side = 0; side < 4; ++side) boxes[(from + i) * 4 + side] = lanes.box[side][i];
  }
}

}  // namespace

std::int64_t decode_topk_scan_float(const Stretch& stretch, std::uint64_t least, std::uint64_t* out) {
  return scan<float>(stretch, least, out);
}

std::int64_t decode_topk_scan_bfloat16(const Stretch& stretch, std::uint64_t least, std::uint64_t* out) {
  return scan<BFloat16>(stretch, least, out);
}

std::int64_t decode_topk_scan_double(const Stretch& stretch, WideEntry least, WideEntry* out) {
  return scan<double>(stretch, least, out);
}

void decode_topk_decode(const DecodeTopkCpuParams& p, std::int64_t image, const void* entries, std::int64_t begin,
                        std::int64_t end) {
  if (p.dtype == kFloat64) return decode<double>(p, image, static_cast<const WideEntry*>(entries), begin, end);
  const auto* narrow_entries = static_cast<const std::uint64_t*>(entries);
  if (p.dtype == kFloat32) return decode<float>(p, image, narrow_entries, begin, end);
  return decode<BFloat16>(p, image, narrow_entries, begin, end);
}

}  // namespace EFFDET_ISA
}  // namespace effdet
