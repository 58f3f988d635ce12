#include "state.h"

#include <algorithm>

#include "array.h"
#include "fail.h"

namespace secateur::python {
namespace {

std::string join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

}  // namespace

StateReader::StateReader(py::handle state, const std::vector<std::string>& keys) {
  if (!py::hasattr(state, "keys")) {
    fail<InvalidArgument>("state", "a mapping with keys " + join(keys), type_name(state));
  }
  state_ = py::dict(py::reinterpret_borrow<py::object>(state));
  std::vector<std::string> found;
  for (const auto& item : state_) found.emplace_back(py::str(item.first));
  std::sort(found.begin(), found.end());
  std::vector<std::string> wanted = keys;
  std::sort(wanted.begin(), wanted.end());
  if (found != wanted) fail<InvalidArgument>("state", "keys " + join(keys), join(found));
}

py::array StateReader::get(const char* key, const py::dtype& dtype,
                           const std::vector<py::ssize_t>& shape) const {
  const py::object value = state_[key];
  if (!py::isinstance<py::array>(value)) {
    fail<InvalidArgument>(key, "a numpy array", type_name(value));
  }
  const auto array = py::reinterpret_borrow<py::array>(value);
  if (!array.dtype().is(dtype) && !array.dtype().equal(dtype)) {
    fail<InvalidArgument>(key, "dtype " + std::string(py::str(dtype)),
                          py::str(py::object(array.dtype())));
  }
  if (!std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + array.ndim())) {
    fail<InvalidArgument>(key,
                          "shape " + to_string(Dims({shape.data(), shape.data() + shape.size()})),
                          py::str(array.attr("shape")));
  }
  return array;
}

std::int64_t StateReader::count(const char* key) const {
  const py::array array = get(key, py::dtype::of<std::int64_t>(), {1});
  return *py::array_t<std::int64_t>(array).data();
}

std::vector<double> StateReader::sums(const char* key,
                                      const std::vector<py::ssize_t>& shape) const {
  const auto array = py::array_t<double, py::array::c_style | py::array::forcecast>(
      get(key, py::dtype::of<double>(), shape));
  return {array.data(), array.data() + array.size()};
}

py::array_t<std::int64_t> count_to_numpy(std::int64_t value) {
  return to_numpy(std::vector<std::int64_t>{value}, {1});
}

}  // namespace secateur::python
