// What is not an op: packing of weights, the choice of the instruction set, plans and what they watch.
#include "common/bind.h"

#include "common/watch.h"
#include "cpu/elementwise.h"
#include "cpu/packing.h"

namespace effdet {
namespace {

WeightParams read_weight(const Fields& f) {
  WeightParams p{};
  p.dtype = f.dtype();
  p.out = f.size("out", 1);
  p.in = f.size("in", 1);
  p.rows = f.size("rows", 1);
  p.columns = f.size("columns", 1);
  p.out_stride = f.stride("out_stride");
  p.in_stride = f.stride("in_stride");
  p.row_stride = f.stride("row_stride");
  p.column_stride = f.stride("column_stride");
  p.weight = f.elements("weight");
  if (f.integer("flipped", 0, 1)) {  // rows and columns from the last to the first
    const std::int64_t last = (p.rows - 1) * p.row_stride + (p.columns - 1) * p.column_stride;
    p.weight = static_cast<const char*>(p.weight) + last * size_of(p.dtype);
    p.row_stride = -p.row_stride;
    p.column_stride = -p.column_stride;
  }
  p.packed = f.pointer("packed", 64);
  return p;
}

VectorParams read_vector(const Fields& f) {
  VectorParams p{};
  p.dtype = f.dtype();
  p.count = f.size("count", 1);
  p.stride = f.stride("stride");
  p.vector = f.accumulators("vector");
  p.packed = f.pointer("packed", 64);
  return p;
}

ElementwiseParams read_elementwise(const Fields& f) {
  ElementwiseParams p{};
  p.dtype = f.dtype();
  p.kind = static_cast<int>(f.integer("kind", kAdded, kBetween));
  p.outer = f.size("outer");
  p.middle = f.size("middle");
  p.inner = f.size("inner");
  p.factor = f.get("factor").cast<double>();
  p.a = f.elements("a");
  p.b = f.optional("b", size_of(p.dtype));
  if (!p.b && p.kind != kScaled) throw std::invalid_argument("b: got None");
  p.b_outer_stride = f.stride("b_outer_stride");
  p.b_middle_stride = f.stride("b_middle_stride");
  p.out = f.elements("out");
  return p;
}

TransposeParams read_transpose(const Fields& f) {
  TransposeParams p{};
  p.dtype = f.dtype();
  p.rows = f.size("rows");
  p.columns = f.size("columns");
  p.x = f.elements("x");
  p.out = f.elements("out");
  return p;
}

CountParams read_count(const Fields& f) {
  return {static_cast<std::int64_t*>(f.pointer("value", 8)), f.get("by").cast<std::int64_t>()};
}

}  // namespace

void bind_cpu(pybind11::module_& module) {
  namespace py = pybind11;
  py::class_<Plan>(module, "Plan")
      .def(py::init<>())
      .def("__len__", &Plan::size)
      .def("run_step",
           [](const Plan& plan, std::size_t step, const std::vector<std::uintptr_t>& bases, int threads) {
             const py::gil_scoped_release released;
             return static_cast<int>(plan.run_step(step, bases, threads));
           })
      .def("run", [](const Plan& plan, const std::vector<std::uintptr_t>& bases, int threads) {
        const py::gil_scoped_release released;
        return static_cast<int>(plan.run(bases, threads));
      });
  py::class_<Watch>(module, "Watch")
      .def(py::init<const py::list&, const py::list&, const py::list&, const py::list&, const py::str&,
                    const py::object&, const py::object&>())
      .def("unchanged", &Watch::unchanged);
  module.def("isa", [] { return static_cast<int>(current_isa()); });
  module.def("set_isa", &set_isa);
  module.def("packed_dense_bytes", [](int dtype, std::int64_t out, std::int64_t segments, std::int64_t length) {
    return EFFDET_FOR_ISA(packed_dense_bytes)(dtype, out, segments, length);
  });
  module.def("packed_depthwise_bytes", [](int dtype, std::int64_t channels, std::int64_t taps) {
    return EFFDET_FOR_ISA(packed_depthwise_bytes)(dtype, channels, taps);
  });
  bind_kernel<ElementwiseParams>(module, "elementwise", read_elementwise, [] { return EFFDET_FOR_ISA(elementwise); });
  bind_kernel<TransposeParams>(module, "transpose", read_transpose, [] { return EFFDET_FOR_ISA(transpose); });
  bind_kernel<CountParams>(module, "count", read_count, [] { return &count; });
  bind_kernel<WeightParams>(module, "pack_dense", read_weight, [] { return EFFDET_FOR_ISA(pack_dense); });
  bind_kernel<WeightParams>(module, "pack_depthwise", read_weight, [] { return EFFDET_FOR_ISA(pack_depthwise); });
  bind_kernel<VectorParams>(module, "pack_vector", read_vector, [] { return EFFDET_FOR_ISA(pack_vector); });
}

}  // namespace effdet
