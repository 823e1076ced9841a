#include "common/activation_codes.h"
#include "cuda/bind_fusion.h"
#include "separable_conv/cuda.h"

namespace effdet::cuda {
namespace {

constexpr std::int64_t kLargest = 0x7fffffff;  // element of an image, counted from its first
constexpr std::int64_t kBeyond = 32;           // rows and columns that a tile may have beyond the map

void check(bool fine, const char* complaint) {
  if (!fine) throw std::invalid_argument(complaint);
}

// A level's `name` by net: of a list as long as there are nets.
pybind11::list by_net(const Fields& f, const char* name, int nets) {
  const auto found = f.get(name).cast<pybind11::list>();
  if (static_cast<int>(found.size()) != nets) throw std::invalid_argument(std::string(name) + ": takes one per net");
  return found;
}

// Their number, weights and output channels, `least` to `most`.
template <typename Params>
void read_nets(const Fields& f, Params& p, int least, int most) {
  p.nets = static_cast<int>(f.integer("nets", 1, kMostNets));
  const int nets = p.nets;
  const pybind11::list dw_weight = by_net(f, "dw_weight", nets), pw_weight = by_net(f, "pw_weight", nets),
                       out_channels = by_net(f, "out_channels", nets);
  for (int net = 0; net < nets; ++net) {
    p.dw_weight[net] = Fields::as_pointer("dw_weight", dw_weight[net], 16);
    p.pw_weight[net] = Fields::as_pointer("pw_weight", pw_weight[net], 16);
    check(p.dw_weight[net] && p.pw_weight[net], "dw_weight, pw_weight: got a null address");
    p.out_channels[net] = out_channels[net].cast<int>();
    check(p.out_channels[net] >= least && p.out_channels[net] <= most, "out_channels: out of range");
  }
}

// Each by `read`, as its fields have it, with the dtype of all.
template <typename Params, typename Read>
void read_levels(const Fields& f, Params& p, const Read& read) {
  const pybind11::list levels = f.get("levels").template cast<pybind11::list>();
  p.count = static_cast<int>(levels.size());
  check(p.count >= 1 && p.count <= kMostLevels, "levels: takes 1 to 8");
  for (int i = 0; i < p.count; ++i) {
    pybind11::dict level = levels[i].template cast<pybind11::dict>();
    level["dtype"] = p.dtype;
    p.levels[i] = read(Fields(level, kFloat16));
  }
}

SeparableLevel read_level(const Fields& f, const SeparableParams& p, bool fused) {
  SeparableLevel level{};
  level.height = count(f, "height");
  level.width = count(f, "width");
  const auto y = by_net(f, "y", p.nets), scale = by_net(f, "scale", p.nets), shift = by_net(f, "shift", p.nets);
  for (int net = 0; net < p.nets; ++net) {
    if (!fused) {
      Map& map = level.x[net];
      map = as_vector_map(f, "x", by_net(f, "x", p.nets)[net]);
      check(map.height == level.height && map.width == level.width, "x: is not of the size of the level");
      check(map.row_stride >= 0 && map.row_stride <= kLargest && map.pixel_stride >= 0 &&
                map.pixel_stride <= kLargest &&
                (level.height + kBeyond) * map.row_stride + (level.width + kBeyond) * map.pixel_stride <= kLargest,
            "x: an image has too many elements");
    }
    level.y[net] = Fields::as_pointer("y", y[net], 16);
    check(level.y[net] != nullptr, "y: got a null address");
    check((level.height + kBeyond) * (level.width + kBeyond) <= kLargest / p.out_channels[net],
          "y: an image has too many elements");
    level.scale[net] = static_cast<const float*>(Fields::as_pointer("scale", scale[net], 4));
    level.shift[net] = static_cast<const float*>(Fields::as_pointer("shift", shift[net], 4));
  }
  return level;
}

SeparableParams read_rest(const Fields& f, bool fused) {
  SeparableParams p{};
  p.dtype = f.dtype();
  check(p.dtype != kFloat64, "dtype: got float64, takes float32, bfloat16 or float16");
  const int unit = static_cast<int>(16 / size_of(p.dtype));
  p.pre_act = static_cast<int>(f.integer("pre_act", 0, kActivations - 1));
  p.act = static_cast<int>(f.integer("act", 0, kActivations - 1));
  p.batch = f.integer("batch", 0, kLargest);
  p.channels = static_cast<int>(f.integer("channels", unit, 1 << 14));
  check(p.channels % unit == 0, "channels: not a multiple of 16 bytes");
  read_nets(f, p, 1, 1 << 16);
  p.rows = static_cast<int>(f.integer("rows", 1, 8));
  const int multiple = separable_warps(p.dtype, p.rows);
  check(multiple != 0, "rows: takes 8, 4 or 2, in float32 4, 2 or 1");
  p.warps = static_cast<int>(f.integer("warps", 1, kMostWarps));
  check(p.warps % multiple == 0, "warps: not a multiple of those that are one below another");
  p.groups = static_cast<int>(f.integer("groups", 1, 2));
  p.depth = static_cast<int>(f.integer("depth", 1, p.channels / unit + 1));
  check(p.dtype == kFloat32 || p.depth % 2 == 0, "depth: takes an even number");
  check(p.depth <= 32 * p.warps, "depth: takes at most one for each thread");
  p.stages = static_cast<int>(f.integer("stages", 1, kMostStages));
  read_levels(f, p, [&](const Fields& level) { return read_level(level, p, fused); });
  return p;
}

SeparableParams read(const Fields& f) {
  return read_rest(f, false);
}

FusedSeparableParams read_fused(const Fields& f) {
  FusedSeparableParams p{read_rest(f, true), read_fused_maps(f)};
  check(p.rest.nets == 1 && p.rest.count == 1, "levels: takes one of one net");
  const SeparableLevel& level = p.rest.levels[0];
  check(p.maps.height == level.height && p.maps.width == level.width, "levels: is not of the size of the maps' sum");
  return p;
}

SeparableGradientLevel read_gradient_level(const Fields& f, const SeparableGradientParams& p) {
  SeparableGradientLevel level{};
  level.height = count(f, "height");
  level.width = count(f, "width");
  const auto x = by_net(f, "x", p.nets), grad = by_net(f, "grad", p.nets), dx = by_net(f, "dx", p.nets);
  for (int net = 0; net < p.nets; ++net) {
    level.x[net] = as_vector_map(f, "x", x[net]);
    level.grad[net] = as_vector_map(f, "grad", grad[net]);
    for (const Map& map : {level.x[net], level.grad[net]})
      check(map.height == level.height && map.width == level.width, "x, grad: is not of the size of the level");
    level.dx[net] = Fields::as_pointer("dx", dx[net], 16);
  }
  dense_map(p.channels, level.height, level.width);
  return level;
}

SeparableGradientParams read_gradient(const Fields& f) {
  SeparableGradientParams p{};
  p.dtype = f.dtype();
  check(p.dtype == kBFloat16 || p.dtype == kFloat16, "dtype: takes bfloat16 or float16");
  p.batch = f.integer("batch", 1, kLargest);
  p.channels = static_cast<int>(f.integer("channels", 8, kMostGradientChannels));
  p.workers = static_cast<int>(f.integer("workers", 1, 1 << 20));
  read_nets(f, p, 8, kMostGradientChannels);
  const auto d_dw = by_net(f, "d_dw", p.nets), d_pw = by_net(f, "d_pw", p.nets);
  for (int net = 0; net < p.nets; ++net) {
    p.d_dw[net] = static_cast<float*>(Fields::as_pointer("d_dw", d_dw[net], 4));
    p.d_pw[net] = static_cast<float*>(Fields::as_pointer("d_pw", d_pw[net], 8));
    check(p.out_channels[net] % 8 == 0 && p.channels % 8 == 0, "channels, out_channels: not a multiple of 8");
  }
  read_levels(f, p, [&](const Fields& level) { return read_gradient_level(level, p); });
  return p;
}

}  // namespace

void bind_cuda_separable_conv(pybind11::module_& module) {
  bind_kernel<SeparableGradientParams>(module, "separable_conv_gradient", read_gradient, separable_conv_gradient);
  bind_kernel<SeparableParams>(module, "separable_conv", read, separable_conv);
  bind_kernel<FusedSeparableParams>(module, "separable_conv_fused", read_fused, separable_conv_fused);
}

}  // namespace effdet::cuda
