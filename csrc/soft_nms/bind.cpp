// Checks the arguments of soft_nms once more and calls the kernel without the GIL.
#include <pybind11/pybind11.h>

#include <limits>

#include "common/dtype.h"
#include "common/pointer.h"
#include "soft_nms/params.h"

namespace effdet {
namespace {

using Address = std::uintptr_t;

template <typename T>
Status run(Address boxes, Address scores, Address classes, Address num_valid, Address index, Address score,
           Address found, Address dropped, std::int64_t batch, std::int64_t count, std::int64_t max_det, int method,
           double sigma, double iou_threshold, double score_threshold, std::int64_t max_per_class, int threads) {
  constexpr std::int64_t kMostCandidates = std::numeric_limits<std::int32_t>::max() / 2;  // of an image
  constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max() / 64;
  if (batch < 0 || count < 0 || max_det < 0 || count > kMostCandidates) return kBadSize;
  if (batch > 0 && (count > kLargest / batch || max_det > kLargest / batch)) return kBadSize;
  if (method < 0 || method > 2 || !(sigma > 0) || max_per_class < 0 || threads < 1) return kBadParameter;
  bool ok = true;
  SoftNmsParams<T> p{};
  p.boxes = as_pointer<const T>(boxes, batch * count, &ok);
  p.scores = as_pointer<const T>(scores, batch * count, &ok);
  p.classes = as_pointer<const std::int64_t>(classes, 0, &ok);
  p.num_valid = as_pointer<const std::int64_t>(num_valid, 0, &ok);
  p.index = as_pointer<std::int64_t>(index, batch * max_det, &ok);
  p.score = as_pointer<T>(score, batch * max_det, &ok);
  p.found = as_pointer<std::int64_t>(found, batch, &ok);
  p.dropped = as_pointer<std::int64_t>(dropped, batch, &ok);
  if (!ok) return kBadPointer;
  p.batch = batch;
  p.count = count;
  p.max_det = max_det;
  p.max_per_class = max_per_class;
  p.method = static_cast<Method>(method);
  p.sigma = static_cast<T>(sigma);
  p.iou_threshold = static_cast<T>(iou_threshold);
  p.score_threshold = static_cast<T>(score_threshold);
  return soft_nms_cpu(p, threads);
}

template <typename... Args>
int soft_nms_cpu_entry(int dtype, Args... args) {
  if (dtype == kFloat32) return run<float>(args...);
  if (dtype == kFloat64) return run<double>(args...);
  return kBadDtype;
}

}  // namespace

void bind_soft_nms(pybind11::module_& module) {
  module.def("soft_nms_cpu",
             &soft_nms_cpu_entry<Address, Address, Address, Address, Address, Address, Address, Address, std::int64_t,
                                 std::int64_t, std::int64_t, int, double, double, double, std::int64_t, int>,
             pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace effdet
