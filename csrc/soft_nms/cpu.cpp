// Soft-NMS on the CPU: deals the candidates of an image to tiles, of one class and about equal scores. pick.simd.cpp
// does the rest. Images run in parallel.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <limits>
#include <new>
#include <vector>

#include "common/parallel_for.h"
#include "common/scratch.h"
#include "soft_nms/tiles.h"

namespace effdet {
namespace {

constexpr std::int64_t kLevels = 2048;  // of scores, among which the order is open

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

  // The numbers of some candidates.
  void number(const std::int32_t* candidates, std::int64_t count, std::int32_t* numbers) const {
    if (size_ == 1) {
      std::fill_n(numbers, count, 0);
    } else if (names_.empty()) {
      for (std::int64_t k = 0; k < count; ++k) numbers[k] = static_cast<std::int32_t>(classes_[candidates[k]] - least_);
    } else {
      for (std::int64_t k = 0; k < count; ++k) {
        const auto found = std::lower_bound(names_.begin(), names_.end(), classes_[candidates[k]]);
        numbers[k] = static_cast<std::int32_t>(found - names_.begin());
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
  std::int32_t* numbers;        // of their classes
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
  std::int64_t count = 0, finite_count = 0;
  for (std::int64_t i = 0; i < limit; ++i) {
    const T* box = boxes + 4 * i;
    // 0, or NaN where one of them is not finite.
    const T zero = box[0] * T(0) + box[1] * T(0) + (box[2] * T(0) + box[3] * T(0)) + scores[i] * T(0);
    const bool finite = zero == T(0);
    kept[count] = static_cast<std::int32_t>(i);
    count += finite & (scores[i] > threshold);
    finite_count += finite;
  }
  *dropped = limit - finite_count;
  return count;
}

// Sorts candidates by levels of their scores, the highest first.
template <typename T>
void sort_by_level(const T* scores, std::int64_t count, std::int32_t** candidates, std::int32_t** spare) {
  const std::int32_t* from = *candidates;
  const auto lower = [scores](std::int32_t a, std::int32_t b) { return scores[a] > scores[b]; };
  if (std::is_sorted(from, from + count, lower)) return;
  T highest = scores[from[0]], lowest = highest;
  for (std::int64_t k = 1; k < count; ++k) {
    highest = std::max(highest, scores[from[k]]);
    lowest = std::min(lowest, scores[from[k]]);
  }
  const T scale = T(kLevels - 1) / (highest - lowest);
  if (!(scale > T(0)) || !std::isfinite(scale)) return;
  const auto level = [=](std::int32_t i) { return static_cast<std::int32_t>((highest - scores[i]) * scale); };
  std::int32_t begin[kLevels + 1] = {};
  for (std::int64_t k = 0; k < count; ++k) ++begin[level(from[k]) + 1];
  for (std::int64_t l = 0; l < kLevels; ++l) begin[l + 1] += begin[l];
  for (std::int64_t k = 0; k < count; ++k) (*spare)[begin[level(from[k])]++] = from[k];
  std::swap(*candidates, *spare);
}

// Deals the kept candidates to the tiles of their classes, in their order.
template <typename T>
void deal(const T* scores, std::int64_t kept, std::int64_t classes, std::int64_t max_per_class, Workspace<T>* w) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  TiledImage<T>& image = w->image;
  image.groups = static_cast<std::int32_t>(classes);
  image.spare = w->sorted;
  std::fill_n(w->to, classes, 0);
  for (std::int64_t k = 0; k < kept; ++k) ++w->to[w->numbers[k]];
  image.tiles = 0;
  for (std::int64_t g = 0; g < classes; ++g) {
    const std::int32_t begin = image.tiles;
    image.tiles += (w->to[g] + kTile - 1) / kTile;
    w->to[g] = begin * kTile;
    image.group[g] = {begin, image.tiles, begin, kNoPick, kNoPick, kNone, max_per_class};
  }
  std::fill_n(image.order, static_cast<std::int64_t>(image.tiles) * kTile, -1);
  // A score below 0 rises, but not above it.
  const T least = T(0);
  std::fill_n(image.highest, image.tiles, least);
  for (std::int64_t k = 0; k < kept; ++k) {
    const std::int32_t to = w->to[w->numbers[k]]++;
    image.order[to] = w->kept[k];
    image.highest[to / kTile] = std::max(image.highest[to / kTile], scores[w->kept[k]]);
  }
  for (std::int32_t tile = image.tiles; tile < image.tiles + kTile; ++tile) image.highest[tile] = kNone;
  for (std::int64_t g = 0; g < classes; ++g) {
    const Group<T>& group = image.group[g];
    for (std::int32_t tile = group.end - 2; tile >= group.begin; --tile)
      image.highest[tile] = std::max(image.highest[tile], image.highest[tile + 1]);
    image.group_highest[g] = group.begin < group.end ? image.highest[group.begin] : kNone;
  }
  std::fill_n(image.group_highest + classes, kTile, kNone);
}

std::int64_t pick(const SoftNmsParams<float>& p, std::int64_t image, const TiledImage<float>& t) {
  return EFFDET_FOR_ISA(soft_nms_pick_float)(p, image, t);
}
std::int64_t pick(const SoftNmsParams<double>& p, std::int64_t image, const TiledImage<double>& t) {
  return EFFDET_FOR_ISA(soft_nms_pick_double)(p, image, t);
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
  sort_by_level(scores, kept, &w.kept, &w.sorted);
  classes.number(w.kept, kept, w.numbers);
  deal(scores, kept, classes.size(), p.max_per_class, &w);
  const std::int64_t found = pick(p, image, w.image);
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
