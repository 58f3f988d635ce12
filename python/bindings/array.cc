#include "array.h"

namespace secateur::python {
namespace {

std::string dtype_text(const py::array& array) { return py::str(array.dtype()); }

DType numpy_dtype(const py::array& array, const std::string& argument) {
  const py::dtype dtype = array.dtype();
  if (dtype.kind() == 'f' && py::cast<bool>(dtype.attr("isnative"))) {
    switch (dtype.itemsize()) {
      case 2:
        return DType::f16;
      case 4:
        return DType::f32;
      case 8:
        return DType::f64;
      default:
        break;
    }
  }
  refuse_dtype(argument, dtype_text(array));
}

MutableTensorView numpy_view(const py::array& array, const std::string& argument) {
  const DType dtype = numpy_dtype(array, argument);
  const auto rank = static_cast<std::size_t>(array.ndim());
  check_rank(rank, argument);
  Dims shape(array.shape(), rank);
  Dims strides = contiguous_strides(shape);
  for (std::size_t axis = 0; axis < rank; ++axis) {
    if (shape[axis] <= 1) continue;  // numpy gives such an axis any stride
    const std::int64_t bytes = array.strides(static_cast<py::ssize_t>(axis));
    if (bytes % array.itemsize() != 0) {
      fail<InvalidArgument>(argument, "strides of whole elements",
                            std::to_string(bytes) + " bytes along axis " + std::to_string(axis));
    }
    strides[axis] = bytes / array.itemsize();
  }
  return {const_cast<void*>(array.data()), dtype, shape, strides};
}

}  // namespace

Array::Array(py::handle object, const std::string& argument) : argument_(argument) {
  // Not through DLPack: numpy 1 refuses to export read-only arrays, and numpy cannot say bfloat16.
  if (py::isinstance<py::array>(object)) {
    const auto array = py::reinterpret_borrow<py::array>(object);
    view_ = numpy_view(array, argument);
    read_only_ = !array.writeable();
    owner_ = array;
    return;
  }
  tensor_ = std::make_unique<dlpack::Tensor>(object, argument);
  view_ = tensor_->view(argument);
  read_only_ = tensor_->read_only();
}

MutableTensorView Array::writable() const {
  if (read_only_) fail<InvalidArgument>(argument_, "writable memory", "a read-only array");
  return view_;
}

std::vector<std::int64_t> to_indices(py::handle object, const std::string& argument) {
  py::array array;
  try {
    array = py::module_::import("numpy").attr("asarray")(object);
  } catch (py::error_already_set& error) {
    if (!is_refusal(error)) throw;
    fail<InvalidArgument>(argument, "a sequence of integers", type_name(object));
  }
  if (array.ndim() != 1) {
    fail<InvalidArgument>(argument, "one dimension", std::to_string(array.ndim()));
  }
  if (array.size() == 0) return {};  // numpy makes float64 of []
  if (array.dtype().kind() != 'i' && array.dtype().kind() != 'u') {
    fail<InvalidArgument>(argument, "integers", dtype_text(array));
  }
  const auto values = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>(array);
  return {values.data(), values.data() + values.size()};
}

py::tuple to_tuple(const Dims& dims) {
  py::tuple result(dims.size());
  for (std::size_t i = 0; i < dims.size(); ++i) result[i] = py::int_(dims[i]);
  return result;
}

}  // namespace secateur::python
