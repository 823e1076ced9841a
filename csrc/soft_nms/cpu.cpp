// Soft-NMS on the CPU. Candidates are grouped by class, since a pick decays its own class only: one step costs a scan
// over the classes' best scores and a pass over one group, not over all candidates. Images run in parallel.
#include <atomic>
#include <limits>
#include <new>
#include <vector>

#include "common/parallel_for.h"
#include "soft_nms/math.h"

namespace effdet {
namespace {

template <typename T>
struct Candidate {
  Box<T> box;
  T area;
  T score;
  std::int64_t index;  // position in the input
};

// Live candidates [begin, end) of one class, in input order; `best` is the position of the first highest score.
struct Group {
  std::int64_t begin, end, best;
};

template <typename T>
bool is_finite(const Box<T>& b) {
  return std::isfinite(b.x0) && std::isfinite(b.y0) && std::isfinite(b.x1) && std::isfinite(b.y1);
}

template <typename T>
void find_best(const std::vector<Candidate<T>>& candidates, Group* group) {
  group->best = group->begin;
  for (std::int64_t i = group->begin + 1; i < group->end; ++i)
    if (candidates[i].score > candidates[group->best].score) group->best = i;
}

// Finite candidates above the threshold; returns how many were dropped for not being finite.
template <typename T>
std::int64_t gather(const SoftNmsParams<T>& p, std::int64_t image, std::vector<Candidate<T>>* candidates) {
  const T* boxes = p.boxes + image * p.count * 4;
  const T* scores = p.scores + image * p.count;
  std::int64_t limit = p.count;
  if (p.num_valid) limit = std::clamp<std::int64_t>(p.num_valid[image], 0, p.count);
  std::int64_t dropped = 0;
  candidates->reserve(limit);
  for (std::int64_t i = 0; i < limit; ++i) {
    const Box<T> box{boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]};
    if (!is_finite(box) || !std::isfinite(scores[i])) {
      ++dropped;
    } else if (scores[i] > p.score_threshold) {
      candidates->push_back({box, area(box), scores[i], i});
    }
  }
  return dropped;
}

// Sorts the candidates by class, input order within a class, and returns the groups.
template <typename T>
std::vector<Group> group_by_class(const std::int64_t* classes, std::vector<Candidate<T>>* candidates) {
  const std::int64_t size = static_cast<std::int64_t>(candidates->size());
  std::vector<Group> groups;
  if (!classes) {
    if (size) groups.push_back({0, size, 0});
  } else {
    std::stable_sort(candidates->begin(), candidates->end(),
                     [classes](const auto& a, const auto& b) { return classes[a.index] < classes[b.index]; });
    for (std::int64_t i = 0; i < size; ++i) {
      const bool same = i > 0 && classes[(*candidates)[i].index] == classes[(*candidates)[i - 1].index];
      if (same) {
        groups.back().end = i + 1;
      } else {
        groups.push_back({i, i + 1, i});
      }
    }
  }
  for (Group& group : groups) find_best(*candidates, &group);
  return groups;
}

// Removes the pick, decays the rest of its group, drops what fell to the threshold, and finds the new best.
template <typename T>
void suppress(const SoftNmsParams<T>& p, std::vector<Candidate<T>>* candidates, Group* group) {
  std::vector<Candidate<T>>& all = *candidates;
  const Candidate<T> pick = all[group->best];
  std::int64_t kept = group->begin;
  std::int64_t best = group->begin;
  T best_score = -std::numeric_limits<T>::infinity();
  for (std::int64_t i = group->begin; i < group->end; ++i) {
    if (i == group->best) continue;
    Candidate<T> other = all[i];
    const T overlap = iou(pick.box, pick.area, other.box, other.area);
    if (overlap > T(0)) {
      const T factor = decay(overlap, p.method, p.sigma, p.iou_threshold);
      if (factor == T(0)) continue;
      other.score *= factor;
    }
    if (!(other.score > p.score_threshold)) continue;
    if (other.score > best_score) {
      best_score = other.score;
      best = kept;
    }
    all[kept++] = other;
  }
  group->end = kept;
  group->best = best;
}

template <typename T>
void one_image(const SoftNmsParams<T>& p, std::int64_t image) {
  std::vector<Candidate<T>> candidates;
  p.dropped[image] = gather(p, image, &candidates);
  std::vector<Group> groups = group_by_class(p.classes ? p.classes + image * p.count : nullptr, &candidates);
  std::int64_t* index = p.index + image * p.max_det;
  T* score = p.score + image * p.max_det;
  std::int64_t found = 0;
  while (found < p.max_det && !groups.empty()) {
    std::size_t best = 0;
    for (std::size_t g = 1; g < groups.size(); ++g) {
      const Candidate<T>& a = candidates[groups[g].best];
      const Candidate<T>& b = candidates[groups[best].best];
      if (a.score > b.score || (a.score == b.score && a.index < b.index)) best = g;
    }
    index[found] = candidates[groups[best].best].index;
    score[found] = candidates[groups[best].best].score;
    ++found;
    suppress(p, &candidates, &groups[best]);
    if (groups[best].begin == groups[best].end) {
      groups[best] = groups.back();
      groups.pop_back();
    }
  }
  p.found[image] = found;
  std::fill(index + found, index + p.max_det, -1);
  std::fill(score + found, score + p.max_det, T(0));
}

}  // namespace

template <typename T>
bool soft_nms_cpu(const SoftNmsParams<T>& params, int threads) {
  std::atomic<bool> enough_memory{true};
  parallel_for(params.batch, threads, [&](std::int64_t image) {
    try {
      one_image(params, image);
    } catch (const std::bad_alloc&) {  // must not leave the parallel region
      enough_memory = false;
    }
  });
  return enough_memory;
}

template bool soft_nms_cpu<float>(const SoftNmsParams<float>&, int);
template bool soft_nms_cpu<double>(const SoftNmsParams<double>&, int);

}  // namespace effdet
