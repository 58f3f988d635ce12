#include <pybind11/stl.h>
#include <secateur/moment_accumulator.h>

#include "array.h"
#include "bindings.h"
#include "guarded.h"
#include "state.h"

namespace secateur::python {
namespace {

using Accumulator = Guarded<MomentAccumulator>;

std::string label(const Accumulator& self, const char* argument) {
  const std::string& name = self.fixed().name();
  return name.empty() ? argument : name + " " + argument;
}

RowNorm row_norm(const std::string& text) {
  if (text == "none") return RowNorm::none;
  if (text == "rms") return RowNorm::rms;
  if (text == "layer") return RowNorm::layer;
  fail<InvalidArgument>("norm", "'none', 'rms' or 'layer'", "'" + text + "'");
}

py::ssize_t dim(const Accumulator& self) { return self.fixed().dim(); }
py::ssize_t packed(const Accumulator& self) { return dim(self) * (dim(self) + 1) / 2; }

py::dict get_state(Accumulator& self) {
  // Memory of numpy's, which asks for huge pages: large sums take a fraction of the time.
  py::array_t<double> sum(dim(self)), second_moment(packed(self));
  double* const sum_data = sum.mutable_data();
  double* const moment_data = second_moment.mutable_data();
  const std::int64_t rows = self.run([&](const MomentAccumulator& m) {
    m.copy_state(sum_data, moment_data);
    return m.rows();
  });
  py::dict result;
  result["rows"] = count_to_numpy(rows);
  result["sum"] = std::move(sum);
  result["second_moment"] = std::move(second_moment);
  return result;
}

void set_state(Accumulator& self, py::handle object) {
  const StateReader reader(object, {"rows", "sum", "second_moment"});
  MomentAccumulatorState state;
  state.rows = reader.count("rows");
  state.sum = reader.sums("sum", {dim(self)});
  state.second_moment = reader.sums("second_moment", {packed(self)});
  self.run([&](MomentAccumulator& m) { m.load_state(std::move(state)); });
}

}  // namespace

void register_moment_accumulator(py::module_& module) {
  py::class_<Accumulator>(
      module, "MomentAccumulator",
      R"(Accumulates rows, Σ x and Σ x xᵀ of a layer's features over a stream of batches.

float32, float16 and bfloat16 rows are multiplied in float32, at most 4,096 at a time, and added up
in float64; float64 rows are multiplied in float64. The sums have the same bits for any number of
threads. Threads may share an object; their calls take turns.

Args:
    dim: features per row, 1 to 65536.
    name: put in front of every error of this object, such as the layer's module path.

Raises:
    InvalidArgument: dim out of its range.
)")
      .def(py::init<std::int64_t, std::string>(), py::arg("dim"), py::kw_only(),
           py::arg("name") = "")
      .def_property_readonly("dim", [](const Accumulator& m) { return m.fixed().dim(); })
      .def_property_readonly("name", [](const Accumulator& m) { return m.fixed().name(); })
      .def_property_readonly(
          "rows",
          [](Accumulator& self) {
            return self.run([](const MomentAccumulator& m) { return m.rows(); });
          },
          "Rows seen.")
      .def(
          "update",
          [](Accumulator& self, py::handle x, const std::string& norm, std::int64_t stride,
             std::int64_t phase) {
            const RowOptions options{row_norm(norm), stride, phase};
            const Array rows(x, label(self, "x"));
            self.run([&](MomentAccumulator& m) { m.update(rows.view(), options); });
          },
          py::arg("x"), py::kw_only(), py::arg("norm") = "none", py::arg("stride") = 1,
          py::arg("phase") = 0,
          R"(Adds every row, without a copy and without the GIL.

Args:
    x: (..., dim), at least one axis, any strides; float32, float16, bfloat16 or float64. On a CUDA
        device where runtime.has_cuda(): multiplied there, on torch's current stream, waited for.
    norm: "rms" adds x √dim / ‖x‖ in place of each row x, "layer" that of x less its mean, as an
        RMSNorm or LayerNorm without weights and eps would; a row of norm 0 stays 0.
    stride: 1 to 2^31; above 1, of x (images, tokens, dim), image b gives only every stride-th token, from
        (phase + b) mod stride on.
    phase: at least 0.

Raises:
    InvalidArgument: not an array, another last axis or dtype, no such norm, or a number out of its
        range.
    Unsupported: on a device that this build does not compute on.
    NumericalError: a NaN or Inf (named by its place), or a magnitude above 1e120.
        The object is then as it was before the call.
)")
      .def_static(
          "update_in_turn",
          [](const std::vector<Accumulator*>& accumulators, py::handle x, const std::string& norm,
             std::int64_t stride, const std::vector<std::int64_t>& phases, bool wait) {
            const auto held = Accumulator::held(accumulators);
            const bool named = !accumulators.empty() && accumulators[0] != nullptr;
            const RowNorm kind = row_norm(norm);
            std::vector<RowOptions> options;
            for (const std::int64_t phase : phases) options.push_back({kind, stride, phase});
            const Array rows(x, named ? label(*accumulators[0], "x") : "x");
            Accumulator::run_all(accumulators, [&](const std::vector<MomentAccumulator*>& objects) {
              MomentAccumulator::update_in_turn(objects, rows.view(), options, wait);
            });
          },
          py::arg("accumulators"), py::arg("x"), py::kw_only(), py::arg("norm") = "none",
          py::arg("stride") = 1, py::arg("phases"), py::arg("wait") = true,
          R"(Adds image i of a batch to accumulator i mod n; on a CUDA device in one pass over all of them.

Args:
    accumulators: 1 to 8 different ones of the same dim.
    x: (images, tokens, dim), as update() takes it.
    norm: as in update().
    stride: as in update().
    phases: of each accumulator, counted over its own images.
    wait: as in AttentionScorer.update_in_turn; without it the memory of x must stay as it is until
        its stream has got there.

Raises:
    InvalidArgument: no accumulators, too many, the same one twice, or of different sizes; and as
        update() raises it.
    Unsupported: as update().
    NumericalError: as update(); accumulators whose own images are sound may have them.
)")
      .def(
          "wait", [](Accumulator& self) { self.run([](const MomentAccumulator& m) { m.wait(); }); },
          R"(Waits for what update_in_turn() has enqueued.

Raises:
    NumericalError: a value that was not finite or too large.
    Error: the device failed.
)")
      .def(
          "merge",
          [](Accumulator& self, Accumulator& other) {
            self.run_with(other,
                          [](MomentAccumulator& m, const MomentAccumulator& o) { m.merge(o); });
          },
          py::arg("other"), R"(Adds what another accumulator has seen.

Raises:
    InvalidArgument: another dim.
)")
      .def(
          "sum",
          [](Accumulator& self) {
            return to_numpy(self.run([](const MomentAccumulator& m) { return m.sum(); }),
                            {dim(self)});
          },
          "Σ x over rows, (dim,).")
      .def(
          "second_moment",
          [](Accumulator& self) {
            return to_numpy(self.run([](const MomentAccumulator& m) { return m.second_moment(); }),
                            {dim(self), dim(self)});
          },
          "Σ x xᵀ over rows, (dim, dim).")
      .def("state", &get_state, R"(Everything accumulated, as arrays to save.

Returns:
    ``rows`` (1,) int64; ``sum`` (dim,); ``second_moment`` (dim(dim+1)/2,): the upper triangle,
    row by row.
)")
      .def("load_state", &set_state, py::arg("state"),
           R"(Replaces everything accumulated by what state() gave.

Raises:
    InvalidArgument: keys, shapes, dtypes or counts that do not fit this object.
    NumericalError: a value that is not finite. Nothing is replaced then.
)")
      .def("__repr__", [](Accumulator& self) {
        const auto rows = self.run([](const MomentAccumulator& m) { return m.rows(); });
        return py::str("MomentAccumulator(dim={}, name={!r}): {} rows")
            .format(self.fixed().dim(), self.fixed().name(), rows);
      });
}

}  // namespace secateur::python
