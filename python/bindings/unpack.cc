#include <secateur/unpack.h>

#include "array.h"
#include "bindings.h"

namespace secateur::python {

void register_unpack(py::module_& module) {
  module.def(
      "unpack",
      [](py::handle packed, py::handle out, double divisor) {
        const Array from(packed, "packed");
        const Array to(out, "out");
        const TensorView packed_view = from.view();
        const MutableTensorView out_view = to.writable();
        const py::gil_scoped_release release;
        unpack(packed_view, out_view, divisor);
      },
      py::arg("packed"), py::arg("out"), py::arg("divisor") = 1.0,
      R"(Writes packed symmetric matrices, as the states of scorers and accumulators hold them, in full.

Args:
    packed: float64 (..., n(n+1)/2), upper triangles row by row; contiguous.
    out: float64 (..., n, n) of the same leading sizes; contiguous, writable, other memory.
    divisor: above 0; every element is divided by it.

Raises:
    InvalidArgument: not an array, another shape, dtype or stride, read-only memory, memory that
        overlaps packed's, or a divisor that is not above 0; nothing is written then.
    Unsupported: not on the CPU.
)");
}

}  // namespace secateur::python
