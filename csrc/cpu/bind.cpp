// What is not an op: packing of weights, the choice of the instruction set, plans and what they watch.
#include "common/bind.h"

#include "common/watch.h"
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
  module.def("pack_dense", [](const py::dict& fields, int threads) {
    return static_cast<int>(EFFDET_FOR_ISA(pack_dense)(read_weight(Fields(fields)), threads));
  });
  module.def("pack_depthwise", [](const py::dict& fields) {
    return static_cast<int>(EFFDET_FOR_ISA(pack_depthwise)(read_weight(Fields(fields))));
  });
  module.def("pack_vector", [](const py::dict& fields) {
    return static_cast<int>(EFFDET_FOR_ISA(pack_vector)(read_vector(Fields(fields))));
  });
}

}  // namespace effdet
