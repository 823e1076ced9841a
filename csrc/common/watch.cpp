#include "common/watch.h"

namespace effdet {

namespace py = pybind11;

namespace {

std::vector<py::object> objects_of(const py::list& list) {
  std::vector<py::object> objects;
  for (const py::handle& item : list) objects.push_back(py::reinterpret_borrow<py::object>(item));
  return objects;
}

}  // namespace

Watch::Watch(const py::list& dicts, const py::list& tensors, const py::list& placed, const py::list& keyed,
             const py::str& key, const py::object& version, const py::object& place)
    : tensors_(objects_of(tensors)),
      placed_(objects_of(placed)),
      keyed_(objects_of(keyed)),
      key_(key),
      version_(version),
      place_(place) {
  if (!Py_TYPE(version_.ptr())->tp_descr_get) throw std::invalid_argument("version: takes a descriptor");
  for (const py::handle& item : dicts) {
    Members members{py::cast<py::dict>(item), {}};
    for (const auto& entry : members.dict) members.values.push_back(py::reinterpret_borrow<py::object>(entry.second));
    members_.push_back(std::move(members));
  }
  for (const py::object& tensor : tensors_) versions_.push_back(version_of(tensor));
  for (const py::object& tensor : placed_) places_.push_back(place_of(tensor));
  for (const py::object& dict : keyed_) entries_.push_back(dict[key_]);
}

std::int64_t Watch::version_of(const py::object& tensor) const {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
  const auto get = Py_TYPE(version_.ptr())->tp_descr_get;
  const py::object version = py::reinterpret_steal<py::object>(get(version_.ptr(), tensor.ptr(), type));
  if (!version) throw py::error_already_set();
  return PyLong_AsLongLong(version.ptr());
}

std::uintptr_t Watch::place_of(const py::object& tensor) const {
  const py::object place = py::reinterpret_steal<py::object>(PyObject_CallOneArg(place_.ptr(), tensor.ptr()));
  if (!place) throw py::error_already_set();
  return PyLong_AsSize_t(place.ptr());
}

bool Watch::unchanged() const {
  for (const Members& members : members_) {
    if (PyDict_Size(members.dict.ptr()) != static_cast<Py_ssize_t>(members.values.size())) return false;
    Py_ssize_t position = 0;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    for (const py::object& expected : members.values) {
      if (!PyDict_Next(members.dict.ptr(), &position, &key, &value) || value != expected.ptr()) return false;
    }
  }
  for (std::size_t i = 0; i < tensors_.size(); ++i)
    if (version_of(tensors_[i]) != versions_[i]) return false;
  for (std::size_t i = 0; i < placed_.size(); ++i)
    if (place_of(placed_[i]) != places_[i]) return false;
  for (std::size_t i = 0; i < keyed_.size(); ++i)
    if (PyDict_GetItemWithError(keyed_[i].ptr(), key_.ptr()) != entries_[i].ptr()) return false;
  return true;
}

}  // namespace effdet
