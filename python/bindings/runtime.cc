#include <secateur/runtime.h>

#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace secateur::python {
namespace {

struct Runtime {};

}  // namespace

void register_runtime(py::module_& module) {
  // A bad SECATEUR_ISA stops the import, not the first call an hour later.
  isa();
  py::class_<Runtime>(module, "runtime", "What the core runs on.")
      .def_static("isa", &isa,
                  "Instruction set in use: SECATEUR_ISA, or the widest this machine has.")
      .def_static("available_isas", &available_isas,
                  "What this build holds and this machine can run, narrowest first.")
      .def_static("threads", &threads, "Threads a call may use, the caller's included.")
      .def_static("set_threads", &set_threads, py::arg("n"),
                  R"(Sets the number of threads; results do not depend on it.

Raises:
    InvalidArgument: not 1 to 1024.
)")
      .def_static("version", &version, "Version of the core, major.minor.patch.");
}

}  // namespace secateur::python
