#include <secateur/runtime.h>

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <atomic>

#include "bindings.h"
#include "fail.h"

namespace py = pybind11;

namespace secateur::python {
namespace {

struct Runtime {};

// What GCC's OpenMP programs, torch among them, call to run a parallel region.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

void openmp_team(void (*body)(void*), void* data, int threads) {
  gomp_parallel.load()(body, data, static_cast<unsigned>(threads), 0);
}

void choose_team(const std::string& name) {
  if (name == "own") return set_team(nullptr);
  if (name != "openmp") fail<InvalidArgument>("team", "'own' or 'openmp'", "'" + name + "'");
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (symbol == nullptr) {
    fail<Unsupported>("team", "OpenMP (libgomp) loaded in this process", "none");
  }
  gomp_parallel.store(reinterpret_cast<GompParallel>(symbol));
  set_team(openmp_team);
}

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
      .def_static("set_team", &choose_team, py::arg("team"),
                  R"(Chooses the threads that calls run on; results do not depend on it.

Args:
    team: "own", which sleep between calls, or "openmp", those of the OpenMP runtime that this
        process has loaded (torch's), so that its spinning threads are not in the way; best with as
        many threads as those are. A forked child begins with "own", and OpenMP cannot run there.

Raises:
    InvalidArgument: no such team.
    Unsupported: the process has no OpenMP runtime of GCC's interface.
)")
      .def_static(
          "team", [] { return team() == nullptr ? "own" : "openmp"; },
          "What set_team() chose, \"own\" from the start.")
      .def_static("version", &version, "Version of the core, major.minor.patch.");
}

}  // namespace secateur::python
