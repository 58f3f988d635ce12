// States as dicts of numpy arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

namespace secateur::python {

namespace py = pybind11;

/// Reads a state dict, refusing what does not fit before anything is used.
class StateReader {
 public:
  /// `state` has to be a mapping with exactly these keys. Throws InvalidArgument.
  StateReader(py::handle state, const std::vector<std::string>& keys);

  /// An int64 array of shape (1,).
  std::int64_t count(const char* key) const;
  /// A float64 array of that shape, row-major.
  std::vector<double> sums(const char* key, const std::vector<py::ssize_t>& shape) const;

 private:
  py::array get(const char* key, const py::dtype& dtype,
                const std::vector<py::ssize_t>& shape) const;

  py::dict state_;
};

/// An int64 array of shape (1,).
py::array_t<std::int64_t> count_to_numpy(std::int64_t value);

}  // namespace secateur::python
