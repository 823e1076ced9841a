// The arithmetic of soft_nms, in the order of operations of ops/soft_nms/reference.py.
#pragma once

#include <algorithm>
#include <cmath>

#include "soft_nms/params.h"

namespace effdet {

template <typename T>
struct Box {
  T x0, y0, x1, y1;
};

template <typename T>
T area(const Box<T>& b) {
  return (b.x1 - b.x0) * (b.y1 - b.y0);
}

// Intersection over union; 0 where the union is empty.
template <typename T>
T iou(const Box<T>& a, T area_a, const Box<T>& b, T area_b) {
  const T w = std::max(std::min(a.x1, b.x1) - std::max(a.x0, b.x0), T(0));
  const T h = std::max(std::min(a.y1, b.y1) - std::max(a.y0, b.y0), T(0));
  const T intersection = w * h;
  const T total = area_a + area_b - intersection;
  return total > T(0) ? intersection / total : T(0);
}

// The factor on the score of a box that overlaps the pick by `overlap`.
template <typename T>
T decay(T overlap, Method method, T sigma, T iou_threshold) {
  if (method == Method::kGaussian) return std::exp(-(overlap * overlap) / sigma);
  if (!(overlap > iou_threshold)) return T(1);
  return method == Method::kLinear ? T(1) - overlap : T(0);
}

}  // namespace effdet
