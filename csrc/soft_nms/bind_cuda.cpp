#include "cuda/bind.h"
#include "soft_nms/cuda_params.h"

namespace effdet::cuda {
namespace {

// Null only where nothing is there to be read or written.
void* array(const Fields& f, const char* name, std::int64_t bytes, bool empty) {
  return empty ? f.optional(name, bytes) : f.pointer(name, bytes);
}

SoftNmsCudaParams read(const Fields& f) {
  SoftNmsCudaParams p{};
  p.batch = f.size("batch");
  p.count = static_cast<int>(f.integer("count", 0, kMostCandidates));
  p.max_det = count(f, "max_det", 0);
  const bool no_candidates = p.batch == 0 || p.count == 0, no_picks = p.batch == 0 || p.max_det == 0;
  p.boxes = static_cast<const float*>(array(f, "boxes", 16, no_candidates));
  p.scores = static_cast<const float*>(array(f, "scores", 4, no_candidates));
  p.classes = static_cast<const std::int64_t*>(f.optional("classes", 8));
  p.num_valid = static_cast<const std::int64_t*>(f.optional("num_valid", 8));
  p.index = static_cast<std::int64_t*>(array(f, "index", 8, no_picks));
  p.score = static_cast<float*>(array(f, "score", 4, no_picks));
  p.found = static_cast<std::int64_t*>(array(f, "found", 8, p.batch == 0));
  p.dropped = static_cast<std::int64_t*>(array(f, "dropped", 8, p.batch == 0));
  p.method = static_cast<Method>(f.integer("method", 0, 2));
  const auto sigma = f.get("sigma").cast<double>();
  if (!(sigma > 0)) throw std::invalid_argument("sigma: takes more than 0");
  p.rate = static_cast<float>(-1.4426950408889634 / sigma);
  p.iou_threshold = static_cast<float>(f.get("iou_threshold").cast<double>());
  p.score_threshold = static_cast<float>(f.get("score_threshold").cast<double>());
  if (!(p.iou_threshold >= 0.0f)) throw std::invalid_argument("iou_threshold: takes at least 0");
  return p;
}

}  // namespace

void bind_cuda_soft_nms(pybind11::module_& module) {
  bind_kernel<SoftNmsCudaParams>(module, "soft_nms", read, soft_nms);
}

}  // namespace effdet::cuda
