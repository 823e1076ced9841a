// Soft-NMS on the CPU: deals the candidates of an image to tiles, of one class and about equal scores. pick.simd.cpp
// does the rest. Images run in parallel.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "common/parallel_for.h"
#include "common/scratch.h"
#include "soft_nms/tiles.h"

namespace effdet {
namespace {

constexpr std::int64_t kLevels = 2048;  // of scores, among which the order is open
constexpr std::int64_t kBest = 8;       // candidates for each pick, to begin with

// Numbers the classes of an image from 0.
class Classes {
 public:
  Classes(const std::int64_t* classes, std::int64_t count) : classes_(count > 0 ? classes : nullptr) {
    if (!classes_) return;
    std::int64_t most = least_ = classes[0];
    for (std::int64_t i = 1; i < count; ++i) {
      least_ = std::min(least_, classes[i]);
      most = std::max(most, classes[i]);
    }
    const auto range = static_cast<std::uint64_t>(most) - static_cast<std::uint64_t>(least_);
    if (range < static_cast<std::uint64_t>(4 * count + 1024)) {
      size_ = static_cast<std::int64_t>(range) + 1;
      return;
    }
    names_.assign(classes, classes + count);
    std::sort(names_.begin(), names_.end());
    names_.erase(std::unique(names_.begin(), names_.end()), names_.end());
    size_ = static_cast<std::int64_t>(names_.size());
  }

  std::int64_t size() const { return size_; }

  // The numbers of the first `count` candidates.
  void number(std::int64_t count, std::int32_t* numbers) const {
    if (size_ == 1) {
      std::fill_n(numbers, count, 0);
    } else if (names_.empty()) {
      for (std::int64_t i = 0; i < count; ++i) numbers[i] = static_cast<std::int32_t>(classes_[i] - least_);
    } else {
      for (std::int64_t i = 0; i < count; ++i) {
        const auto found = std::lower_bound(names_.begin(), names_.end(), classes_[i]);
        numbers[i] = static_cast<std::int32_t>(found - names_.begin());
      }
    }
  }

 private:
  const std::int64_t* classes_;
  std::int64_t least_ = 0, size_ = 1;
  std::vector<std::int64_t> names_;  // sorted; empty where classes lie close together
};

// The arrays of an image in the memory from `base` on.
template <typename T>
struct Workspace {
  TiledImage<T> image{};
  std::int32_t *kept, *sorted;  // candidates
  std::int32_t* levels;         // of the kept ones' scores
  std::int32_t* numbers;        // of all candidates' classes
  std::int32_t* to;             // the next place in `order`, of each class

  Workspace(std::byte* base, std::int64_t count, std::int64_t groups, std::int64_t most_picks) : at_(base) {
    const std::int64_t tiles = count / kTile + std::min(count, groups);
    take(&image.candidates, tiles);
    for (T*& bound : image.bounds) take(&bound, tiles + kTile);
    take(&image.highest, tiles + kTile);
    take(&image.group, groups);
    take(&image.group_highest, groups + kTile);
    take(&image.picks, most_picks * 5);
    take(&image.next_pick, most_picks);
    take(&image.order, tiles * kTile);
    take(&kept, count + 1);
    take(&sorted, count);
    take(&levels, count);
    take(&numbers, count);
    take(&to, groups);
  }

  static std::size_t bytes(std::int64_t count, std::int64_t groups, std::int64_t most_picks) {
    return reinterpret_cast<std::size_t>(Workspace(nullptr, count, groups, most_picks).at_);
  }

 private:
  template <typename U>
  void take(U** array, std::int64_t elements) {
    *array = reinterpret_cast<U*>(at_);
    at_ = reinterpret_cast<std::byte*>(reinterpret_cast<std::size_t>(at_) +
                                       (static_cast<std::size_t>(elements) * sizeof(U) + 63) / 64 * 64);
  }

  std::byte* at_;
};

// Writes the candidates that are finite and above the threshold to `kept`, which has room for one more; returns how
// many they are, and in `dropped` how many are not finite.
template <typename T>
std::int64_t gather(const T* boxes, const T* scores, std::int64_t limit, T threshold, std::int32_t* kept,
                    std::int64_t* dropped) {
  constexpr std::int64_t kBlock = 64;  // candidates, usually all of them kept or none above the threshold
  std::int64_t count = 0, finite_count = 0;
  for (std::int64_t begin = 0; begin < limit; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, limit);
    int infinite = 0, low = 0;
    for (std::int64_t k = 4 * begin; k < 4 * end; ++k) infinite += !(boxes[k] * T(0) == T(0));
    for (std::int64_t i = begin; i < end; ++i) {
      infinite += !(scores[i] * T(0) == T(0));
      low += !(scores[i] > threshold);
    }
    if (infinite == 0 && low == 0) {
      for (std::int64_t i = begin; i < end; ++i) kept[count++] = static_cast<std::int32_t>(i);
      finite_count += end - begin;
    } else if (infinite == 0 && low == end - begin) {
      finite_count += end - begin;
    } else {
      for (std::int64_t i = begin; i < end; ++i) {
        const T* box = boxes + 4 * i;
        // 0, or NaN where one of them is not finite.
        const T zero = box[0] * T(0) + box[1] * T(0) + (box[2] * T(0) + box[3] * T(0)) + scores[i] * T(0);
        const bool finite = zero == T(0);
        kept[count] = static_cast<std::int32_t>(i);
        count += finite & (scores[i] > threshold);
        finite_count += finite;
      }
    }
  }
  *dropped = limit - finite_count;
  return count;
}

// The lowest and the highest score of some candidates, of at least one.
template <typename T>
std::pair<T, T> range_of(const T* scores, const std::int32_t* candidates, std::int64_t count) {
  constexpr int kChains = 4;  // a comparison waits for the one before
  T lowest[kChains], highest[kChains];
  std::fill_n(lowest, kChains, scores[candidates[0]]);
  std::fill_n(highest, kChains, scores[candidates[0]]);
  for (std::int64_t k = 0; k < count; ++k) {
    const T score = scores[candidates[k]];
    lowest[k % kChains] = std::min(lowest[k % kChains], score);
    highest[k % kChains] = std::max(highest[k % kChains], score);
  }
  return {*std::min_element(lowest, lowest + kChains), *std::max_element(highest, highest + kChains)};
}

// Sorts the kept candidates by levels of their scores, the highest first.
template <typename T>
void sort_by_level(const T* scores, std::int64_t count, Workspace<T>* w) {
  const std::int32_t* from = w->kept;
  const auto lower = [scores](std::int32_t a, std::int32_t b) { return scores[a] > scores[b]; };
  if (std::is_sorted(from, from + count, lower)) return;
  const auto [lowest, highest] = range_of(scores, from, count);
  const T scale = T(kLevels - 1) / (highest - lowest);
  if (!(scale > T(0)) || !std::isfinite(scale)) return;
  std::int32_t begin[kLevels + 1] = {};
  for (std::int64_t k = 0; k < count; ++k) {
    w->levels[k] = static_cast<std::int32_t>((highest - scores[from[k]]) * scale);
    ++begin[w->levels[k] + 1];
  }
  for (std::int64_t l = 0; l < kLevels; ++l) begin[l + 1] += begin[l];
  for (std::int64_t k = 0; k < count; ++k) w->sorted[begin[w->levels[k]]++] = from[k];
  std::swap(w->kept, w->sorted);
}

// Deals the first `kept` of the kept candidates to the tiles of their classes, in their order.
template <typename T>
void deal(const T* scores, std::int64_t kept, std::int64_t classes, std::int64_t max_per_class, Workspace<T>* w) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  TiledImage<T>& image = w->image;
  image.groups = static_cast<std::int32_t>(classes);
  image.spare = w->sorted;
  std::fill_n(w->to, classes, 0);
  for (std::int64_t k = 0; k < kept; ++k) ++w->to[w->numbers[w->kept[k]]];
  image.tiles = 0;
  for (std::int64_t g = 0; g < classes; ++g) {
    const std::int32_t begin = image.tiles;
    image.tiles += (w->to[g] + kTile - 1) / kTile;
    w->to[g] = begin * kTile;
    image.group[g] = {begin, image.tiles, begin, kNoPick, kNoPick, kNone, max_per_class};
  }
  std::fill_n(image.order, static_cast<std::int64_t>(image.tiles) * kTile, -1);
  for (std::int64_t k = 0; k < kept; ++k) image.order[w->to[w->numbers[w->kept[k]]]++] = w->kept[k];
  std::fill_n(image.highest + image.tiles, kTile, kNone);
  for (std::int64_t g = 0; g < classes; ++g) {
    const Group<T>& group = image.group[g];
    T highest = T(0);  // a score below 0 rises, but not above it
    for (std::int32_t tile = group.end - 1; tile >= group.begin; --tile) {
      for (const std::int32_t* i = image.order + tile * kTile; i < image.order + (tile + 1) * kTile; ++i)
        if (*i >= 0) highest = std::max(highest, scores[*i]);
      image.highest[tile] = highest;
    }
    image.group_highest[g] = group.begin < group.end ? highest : kNone;
  }
  std::fill_n(image.group_highest + classes, kTile, kNone);
}

std::int64_t pick(const SoftNmsParams<float>& p, std::int64_t image, const TiledImage<float>& t, float above) {
  return EFFDET_FOR_ISA(soft_nms_pick_float)(p, image, t, above);
}
std::int64_t pick(const SoftNmsParams<double>& p, std::int64_t image, const TiledImage<double>& t, double above) {
  return EFFDET_FOR_ISA(soft_nms_pick_double)(p, image, t, above);
}

template <typename T>
Status one_image(const SoftNmsParams<T>& p, std::int64_t image) {
  std::int64_t limit = p.count;
  if (p.num_valid) limit = std::clamp<std::int64_t>(p.num_valid[image], 0, p.count);
  const T* scores = p.scores + image * p.count;
  const Classes classes(p.classes ? p.classes + image * p.count : nullptr, limit);
  const std::int64_t most_picks = std::min(p.max_det, limit);
  auto* memory = static_cast<std::byte*>(thread_scratch(Workspace<T>::bytes(limit, classes.size(), most_picks)));
  if (!memory) return kOutOfMemory;
  Workspace<T> w(memory, limit, classes.size(), most_picks);
  const std::int64_t kept =
      gather(p.boxes + image * p.count * 4, scores, limit, p.score_threshold, w.kept, p.dropped + image);
  sort_by_level(scores, kept, &w);
  classes.number(limit, w.numbers);
  // Usually all picks are among the best candidates, above whatever the others can have. Otherwise all take part.
  std::int64_t dealt = std::min(kept, kBest * most_picks), found = 0;
  for (;; dealt = kept) {
    T above = -std::numeric_limits<T>::infinity();
    if (dealt < kept)  // a score below 0 rises, but not above it
      above = std::max(range_of(scores, w.kept + dealt, kept - dealt).second, T(0));
    deal(scores, dealt, classes.size(), p.max_per_class, &w);
    found = pick(p, image, w.image, above);
    if (found == most_picks || dealt == kept) break;
  }
  std::fill_n(p.index + image * p.max_det + found, p.max_det - found, -1);
  std::fill_n(p.score + image * p.max_det + found, p.max_det - found, T(0));
  p.found[image] = found;
  return kOk;
}

}  // namespace

template <typename T>
Status soft_nms_cpu(const SoftNmsParams<T>& params, int threads) {
  std::atomic<bool> enough_memory{true};
  parallel_for(params.batch, threads, [&](std::int64_t image) {
    try {
      if (one_image(params, image) != kOk) enough_memory = false;
    } catch (const std::bad_alloc&) {  // must not leave the parallel region
      enough_memory = false;
    }
  });
  return enough_memory ? kOk : kOutOfMemory;
}

template Status soft_nms_cpu<float>(const SoftNmsParams<float>&, int);
template Status soft_nms_cpu<double>(const SoftNmsParams<double>&, int);

}  // namespace effdet
