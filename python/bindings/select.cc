#include <secateur/select.h>

#include "array.h"
#include "bindings.h"

namespace secateur::python {

void register_select(py::module_& module) {
  module.def(
      "select",
      [](py::handle scores, std::int64_t keep) {
        const Array array(scores, "scores");
        TensorView view = array.view();
        if (view.rank() != 1 && view.rank() != 2) {
          fail<InvalidArgument>("scores", "shape (n,) or (groups, n)", to_string(view.shape));
        }
        std::vector<py::ssize_t> shape{view.shape.begin(), view.shape.end() - 1};
        shape.push_back(keep);
        if (view.rank() == 1) {
          view.strides = Dims{0, view.strides[0]};
          view.shape = Dims{1, view.shape[0]};
        }
        return to_numpy(select(view, keep), shape);
      },
      py::arg("scores"), py::arg("keep"), R"(The highest scores of each group, as ascending indices.

Args:
    scores: (n,) or (groups, n); of equal scores the lower index is kept.
    keep: how many to keep per group, 1 to n.

Returns:
    int64 (keep,) or (groups, keep).

Raises:
    InvalidArgument: not an array, another shape or dtype, or keep out of its range.
    Unsupported: not on the CPU.
    NumericalError: a NaN.
)");
}

}  // namespace secateur::python
