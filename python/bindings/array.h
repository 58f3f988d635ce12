// Python arrays and tensors as views, without a copy; and C++ results as numpy arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <secateur/tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "dlpack.h"

namespace secateur::python {

namespace py = pybind11;

/// A numpy array or anything that speaks DLPack, held for the time of a call.
/// Create and destroy it with the GIL held; the view may be used without.
class Array {
 public:
  /// Throws InvalidArgument or Unsupported, naming the argument.
  Array(py::handle object, const std::string& argument);

  TensorView view() const { return view_; }
  /// The same for writing; throws InvalidArgument for memory that is read-only.
  MutableTensorView writable() const;

 private:
  std::string argument_;
  py::object owner_;
  std::unique_ptr<dlpack::Tensor> tensor_;
  MutableTensorView view_;
  bool read_only_ = false;
};

/// Hands the memory of `values` to a numpy array.
template <typename T>
py::array_t<T> to_numpy(std::vector<T> values, const std::vector<py::ssize_t>& shape) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  T* data = owned->data();
  const py::capsule owner(owned.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  owned.release();
  return py::array_t<T>(shape, data, owner);
}

/// A one-dimensional sequence, array or tensor of integers.
std::vector<std::int64_t> to_indices(py::handle object, const std::string& argument);

/// (2, 3) as a tuple.
py::tuple to_tuple(const Dims& dims);

}  // namespace secateur::python
