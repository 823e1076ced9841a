// How kernels are bound: Python names every field of their parameters, so that no two can be mixed up.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/map.h"
#include "common/plan.h"
#include "common/status.h"

namespace effdet {

// Reads the fields of a call from a dict; every complaint names the field.
class Fields {
 public:
  explicit Fields(const pybind11::dict& fields, Dtype last = kBFloat16) : fields_(fields), dtype_(-1) {
    if (fields_.contains("dtype")) dtype_ = integer("dtype", kFloat32, last);
  }

  int dtype() const { return dtype_; }

  std::int64_t integer(const char* name, std::int64_t smallest, std::int64_t largest) const {
    const auto value = get(name).cast<std::int64_t>();
    if (value < smallest || value > largest)
      throw std::invalid_argument(std::string(name) + ": got " + std::to_string(value) + ", takes " +
                                  std::to_string(smallest) + " to " + std::to_string(largest));
    return value;
  }

  // A count of elements, pixels or channels.
  std::int64_t size(const char* name, std::int64_t smallest = 0) const { return integer(name, smallest, kLargest); }

  // A distance between elements.
  std::int64_t stride(const char* name) const { return integer(name, -kLargest, kLargest); }

  // An address, not null, aligned for elements of `bytes`.
  void* pointer(const char* name, std::int64_t bytes) const {
    void* found = optional(name, bytes);
    if (!found) throw std::invalid_argument(std::string(name) + ": got a null address");
    return found;
  }

  // The same, or null for None.
  void* optional(const char* name, std::int64_t bytes) const { return as_pointer(name, get(name), bytes); }

  void* elements(const char* name) const { return pointer(name, size_of(dtype_)); }
  void* accumulators(const char* name) const { return pointer(name, dtype_ == kFloat64 ? 8 : 4); }
  void* optional_accumulators(const char* name) const { return optional(name, dtype_ == kFloat64 ? 8 : 4); }

  // (address, height, width, batch stride, row stride, pixel stride)
  Map map(const char* name) const { return as_map(name, get(name)); }

  Map as_map(const char* name, const pybind11::handle& value) const {
    const auto items = value.cast<pybind11::tuple>();
    if (items.size() != 6) throw std::invalid_argument(std::string(name) + ": takes six numbers");
    Map map;
    map.data = as_pointer(name, items[0], size_of(dtype_));
    if (!map.data) throw std::invalid_argument(std::string(name) + ": got a null address");
    map.height = items[1].cast<std::int64_t>();
    map.width = items[2].cast<std::int64_t>();
    map.batch_stride = items[3].cast<std::int64_t>();
    map.row_stride = items[4].cast<std::int64_t>();
    map.pixel_stride = items[5].cast<std::int64_t>();
    if (map.height < 1 || map.width < 1 || map.height > kLargest || map.width > kLargest)
      throw std::invalid_argument(std::string(name) + ": an extent is out of range");
    return map;
  }

  static void* as_pointer(const char* name, const pybind11::handle& value, std::int64_t bytes) {
    if (value.is_none()) return nullptr;
    const bool number = PyLong_CheckExact(value.ptr());
    const auto address = (number ? value : pybind11::handle(value.attr("data_ptr")())).cast<std::uintptr_t>();
    if (address % static_cast<std::uintptr_t>(bytes) != 0)
      throw std::invalid_argument(std::string(name) + ": the address is not a multiple of " + std::to_string(bytes));
    return reinterpret_cast<void*>(address);
  }

  pybind11::object get(const char* name) const {
    if (!fields_.contains(name)) throw std::invalid_argument(std::string(name) + ": missing");
    return fields_[name];
  }

 private:
  static constexpr std::int64_t kLargest = std::int64_t{1} << 46;

  const pybind11::dict& fields_;
  int dtype_;
};

// Binds a kernel twice: `<name>_cpu(fields, threads)` runs it, `Plan.<name>(fields)` adds it to a plan.
template <typename Params>
void bind_kernel(pybind11::module_& module, const char* name, Params (*read)(const Fields&),
                 Status (*(*kernel)())(const Params&, int)) {
  module.def((std::string(name) + "_cpu").c_str(), [read, kernel](const pybind11::dict& fields, int threads) {
    if (threads < 1) throw std::invalid_argument("threads: takes at least 1");
    const Params params = read(Fields(fields));
    const auto run = kernel();
    const pybind11::gil_scoped_release released;
    return static_cast<int>(run(params, threads));
  });
  const auto add = [read, kernel](Plan& plan, const pybind11::dict& fields) {
    plan.add(read(Fields(fields)), kernel());
  };
  const pybind11::object plan = module.attr("Plan");
  plan.attr(name) = pybind11::cpp_function(add, pybind11::name(name), pybind11::is_method(plan));
}

}  // namespace effdet
