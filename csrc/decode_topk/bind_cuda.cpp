#include "cuda/bind.h"
#include "decode_topk/params.h"

namespace effdet::cuda {
namespace {

// Logits of an image, for kernels that count them in 32 bits, with what is left of groups.
constexpr std::int64_t kMostLogits = (std::int64_t{1} << 31) - (1 << 16);

DecodeTopkParams read(const Fields& f) {
  DecodeTopkParams p{};
  p.dtype = f.dtype();
  if (p.dtype == kFloat64) throw std::invalid_argument("dtype: got float64, takes float32, bfloat16 or float16");
  p.batch = f.size("batch", 1);
  p.classes = count(f, "classes");
  p.per_location = count(f, "per_location");
  const auto levels = f.get("levels").cast<pybind11::list>();
  if (levels.empty() || levels.size() > kMostLevels)
    throw std::invalid_argument("levels: got " + std::to_string(levels.size()) + ", takes 1 to " +
                                std::to_string(kMostLevels));
  p.level_count = static_cast<int>(levels.size());
  std::int64_t all = 0;
  for (int i = 0; i < p.level_count; ++i) {
    const auto level = levels[static_cast<std::size_t>(i)].cast<pybind11::tuple>();  // logits, codes, length, width
    if (level.size() != 4) throw std::invalid_argument("levels: takes four values of each");
    p.levels[i].logits = Fields::as_pointer("logits", level[0], size_of(p.dtype));
    p.levels[i].codes = Fields::as_pointer("codes", level[1], size_of(p.dtype));
    if (!p.levels[i].logits || !p.levels[i].codes) throw std::invalid_argument("levels: got a null address");
    const auto length = level[2].cast<std::int64_t>();
    if (length < 1 || length > kMostLogits || length % p.classes != 0)
      throw std::invalid_argument("levels: got " + std::to_string(length) + " logits of " + std::to_string(p.classes) +
                                  " classes");
    p.levels[i].length = static_cast<int>(length);
    const auto width = level[3].cast<std::int64_t>();
    if (width < 1 || width > length || length / p.classes % (width * p.per_location) != 0)
      throw std::invalid_argument("levels: got " + std::to_string(length / p.classes) + " anchors, " +
                                  std::to_string(p.per_location) + " of a location, in rows of " +
                                  std::to_string(width) + " locations");
    p.levels[i].width = static_cast<int>(width);
    all += length;
  }
  if (all > kMostLogits)
    throw std::invalid_argument("levels: got " + std::to_string(all) + " logits of an image, takes " +
                                std::to_string(kMostLogits));
  p.kept = static_cast<int>(f.integer("kept", 1, all < kMostPicks ? all : kMostPicks));
  p.room = static_cast<int>(f.integer("room", 0, 1 << 20));
  if (p.room != 0 && p.room <= p.kept) throw std::invalid_argument("room: takes more than are kept");
  p.anchors = static_cast<const float*>(f.pointer("anchors", 16));
  p.strides = static_cast<const float*>(f.optional("strides", 4));
  p.limits = static_cast<const float*>(f.optional("limits", 4));
  p.boxes = static_cast<float*>(f.pointer("boxes", 16));
  p.logits = f.elements("logits");
  p.anchor_index = static_cast<std::int64_t*>(f.pointer("anchor_index", 8));
  p.classes_of = static_cast<std::int64_t*>(f.pointer("classes_of", 8));
  p.scratch = f.pointer("scratch", 16);
  p.scratch_bytes = f.size("scratch_bytes");
  const std::int64_t needed = decode_topk_scratch(p);
  if (p.scratch_bytes < needed)
    throw std::invalid_argument("scratch_bytes: got " + std::to_string(p.scratch_bytes) + ", takes " +
                                std::to_string(needed));
  return p;
}

}  // namespace

void bind_cuda_decode_topk(pybind11::module_& module) {
  bind_kernel<DecodeTopkParams>(module, "decode_topk", read, decode_topk);
}

}  // namespace effdet::cuda
