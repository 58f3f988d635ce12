#include <secateur/value_similarity.h>

#include "array.h"
#include "bindings.h"

namespace secateur::python {
namespace {

template <typename Function>
std::vector<double> without_gil(Function&& function) {
  const py::gil_scoped_release release;
  return function();
}

}  // namespace

void register_value_similarity(py::module_& module) {
  module.def(
      "value_similarity",
      [](py::handle weights) {
        const Array rows(weights, "weights");
        const TensorView view = rows.view();
        std::vector<double> scores = without_gil([&] { return value_similarity(view); });
        return to_numpy(std::move(scores), {view.shape.begin(), view.shape.end() - 1});
      },
      py::arg("weights"), R"(For each row, the sum over all other rows of 1 − |cos|.

SNP's importance of value neurons (Shim et al., ECCV 2024, arXiv:2404.11630): low where other rows,
of any head, say the same. A zero row scores 0 and has cosine 0 with every other.

Args:
    weights: (rows, D), or (heads, head_dim, D) compared across all heads; any strides;
        float32, float16, bfloat16 or float64.

Returns:
    (rows,) or (heads, head_dim).

Raises:
    InvalidArgument: not an array, or another shape or dtype.
    Unsupported: not on the CPU.
    NumericalError: a NaN or Inf.
)");
  module.def(
      "value_similarity_from_moment",
      [](py::handle moment) {
        const Array matrix(moment, "moment");
        const TensorView view = matrix.view();
        std::vector<double> scores =
            without_gil([&] { return value_similarity_from_moment(view); });
        return to_numpy(std::move(scores), {view.shape[0]});
      },
      py::arg("moment"), R"(value_similarity over activations, from their second moment.

Args:
    moment: symmetric (R, R) with a diagonal of at least 0; cos_ij = C_ij / sqrt(C_ii C_jj).

Returns:
    (R,).

Raises:
    InvalidArgument: not an array, not square, not symmetric, or a negative diagonal.
    Unsupported: not on the CPU.
    NumericalError: a NaN or Inf.
)");
}

}  // namespace secateur::python
