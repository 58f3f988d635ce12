#include <secateur/compact.h>

#include "array.h"
#include "bindings.h"

namespace secateur::python {

void register_compact(py::module_& module) {
  module.def(
      "compact",
      [](py::handle tensor, std::int64_t dim, py::handle keep) {
        const Array array(tensor, "tensor");
        const std::vector<std::int64_t> indices = to_indices(keep, "keep");
        const MutableTensorView view = array.writable();
        MutableTensorView result;
        {
          const py::gil_scoped_release release;
          result = compact(view, dim, indices);
        }
        return py::make_tuple(to_tuple(result.shape), to_tuple(result.strides));
      },
      py::arg("tensor"), py::arg("dim"), py::arg("keep"),
      R"(Keeps some indices along one axis, in place, moving memory forward without a second buffer.

Args:
    tensor: any shape and strides, writable, float32, float16, bfloat16 or float64. A row-major
        contiguous one is packed at the front of its memory, and the rest may be given back; any
        other keeps its strides, and nothing outside of the view is written. On a CUDA device where
        runtime.has_cuda() it is moved there, on torch's current stream, and not waited for; 32 MiB
        of the device's memory are used meanwhile.
    dim: the axis, from 0.
    keep: ascending, unique indices, at least one.

Returns:
    Shape and strides (in elements) of the result, which begins where the tensor began.

Raises:
    InvalidArgument: a bad index, a read-only or self-overlapping tensor, another dtype.
        Nothing has been moved then.
    Unsupported: on a device that this build does not compute on.
)");
}

}  // namespace secateur::python
