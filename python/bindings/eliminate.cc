#include <secateur/eliminate.h>

#include "array.h"
#include "bindings.h"

namespace secateur::python {

void register_eliminate(py::module_& module) {
  module.def(
      "eliminate",
      [](py::handle inverse, py::handle weights, std::int64_t count) {
        const Array matrix(inverse, "inverse");
        const Array rows(weights, "weights");
        const TensorView matrix_view = matrix.view(), rows_view = rows.view();
        Elimination result;
        {
          const py::gil_scoped_release release;
          result = eliminate(matrix_view, rows_view, count);
        }
        return py::make_tuple(to_numpy(std::move(result.order), {count}),
                              to_numpy(std::move(result.costs), {count}));
      },
      py::arg("inverse"), py::arg("weights"), py::arg("count"),
      R"(Removes inputs of a linear layer one at a time, always the one that costs least.

Greedy backward elimination, the optimal brain surgeon for groups (Hassibi & Stork, NIPS 1992;
arXiv:2608.17657): the remaining inputs' weights make up for each removal, and the next is chosen by
the weights so changed. Ties: the lower index. The same bits for any number of threads.

Args:
    inverse: symmetric positive definite (n, n), the inverse of the inputs' second moment or
        covariance C with a ridge; any strides; float32, float16, bfloat16 or float64.
    weights: (n, outputs), row j what reads input j (a torch Linear's weight transposed).
    count: how many to remove, 0 to n.

Returns:
    int64 (count,), the inputs in the order of their removal, of which any prefix is the answer for
    fewer; and float64 (count,), the least-squares error that each adds: the running sum is
    tr((W − Ŵ)ᵀ C (W − Ŵ)) for the best Ŵ on the inputs that remain.

Raises:
    InvalidArgument: not an array, another shape or dtype, count out of its range, an asymmetric
        matrix or a diagonal that is not positive.
    Unsupported: not on the CPU.
    NumericalError: a NaN or Inf, costs beyond float64, or a diagonal lost to rounding: an input
        was a linear combination of others to working precision (a larger ridge tells them apart),
        or the matrix is not positive definite.
)");
}

}  // namespace secateur::python
