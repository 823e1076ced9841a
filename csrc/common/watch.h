// Whether Python objects are still the ones that were seen: what a plan checks at every call, in microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

namespace effdet {

// A snapshot of dicts (their values, by identity), of tensors (their version counters), of the addresses of some of
// them, and of the entry `key` of more dicts. Everything named is kept alive.
class Watch {
 public:
  Watch(const pybind11::list& dicts, const pybind11::list& tensors, const pybind11::list& placed,
        const pybind11::list& keyed, const pybind11::str& key, const pybind11::object& version,
        const pybind11::object& place);

  // Whether nothing differs from the snapshot.
  bool unchanged() const;

 private:
  struct Members {
    pybind11::dict dict;
    std::vector<pybind11::object> values;
  };

  std::vector<Members> members_;
  std::int64_t version_of(const pybind11::object& tensor) const;
  std::uintptr_t place_of(const pybind11::object& tensor) const;

  std::vector<pybind11::object> tensors_, placed_, keyed_, entries_;
  std::vector<std::int64_t> versions_;
  std::vector<std::uintptr_t> places_;
  pybind11::str key_;
  pybind11::object version_, place_;  // the descriptor Tensor._version, the function Tensor.data_ptr
};

}  // namespace effdet
