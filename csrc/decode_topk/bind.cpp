#include "common/bind.h"

#include "decode_topk/cpu_params.h"

namespace effdet {
namespace {

DecodeTopkCpuParams read(const Fields& f) {
  DecodeTopkCpuParams p{};
  p.dtype = f.dtype();
  p.batch = f.size("batch");
  p.anchors = f.integer("anchors", 1, kMostPlaces);
  p.classes = f.integer("classes", 1, kMostPlaces);
  std::int64_t locations = 0;
  for (const auto& item : f.get("levels").cast<pybind11::list>()) {
    const auto values = item.cast<pybind11::tuple>();
    if (values.size() != 6) throw std::invalid_argument("levels: takes six values of each");
    TopkLevel level{};
    level.logits = Fields::as_pointer("logits", values[0], size_of(p.dtype));
    level.codes = Fields::as_pointer("codes", values[1], size_of(p.dtype));
    if (!level.logits || !level.codes) throw std::invalid_argument("levels: got a null address");
    level.height = values[2].cast<std::int64_t>();
    level.width = values[3].cast<std::int64_t>();
    if (level.height < 1 || level.width < 1 || level.height > kMostPlaces || level.width > kMostPlaces / level.height)
      throw std::invalid_argument("levels: an extent is out of range");
    level.logits_planar = values[4].cast<bool>();
    level.codes_planar = values[5].cast<bool>();
    locations += level.height * level.width;
    p.levels.push_back(level);
  }
  if (p.classes > kMostPlaces / p.anchors || locations > kMostPlaces / (p.anchors * p.classes))
    throw std::invalid_argument("levels: an image has more than 2^32 logits");
  p.kept = f.integer("kept", 0, locations * p.anchors * p.classes);
  p.strides = static_cast<const double*>(f.optional("strides", 8));
  if (p.strides) {
    p.grid = static_cast<const double*>(f.pointer("anchor_boxes", 8));
  } else {
    p.anchor_boxes = f.accumulators("anchor_boxes");
  }
  p.limits = f.optional_accumulators("limits");
  p.boxes = f.accumulators("boxes");
  p.logits = f.elements("logits");
  p.anchor_index = static_cast<std::int64_t*>(f.pointer("anchor_index", 8));
  p.classes_of = static_cast<std::int64_t*>(f.pointer("classes_of", 8));
  return p;
}

}  // namespace

void bind_decode_topk(pybind11::module_& module) {
  module.def("decode_topk_cpu", [](const pybind11::dict& fields, int threads) {
    if (threads < 1) throw std::invalid_argument("threads: takes at least 1");
    const DecodeTopkCpuParams params = read(Fields(fields));
    const pybind11::gil_scoped_release released;
    return static_cast<int>(decode_topk(params, threads));
  });
}

}  // namespace effdet
