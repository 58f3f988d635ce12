#include <secateur/runtime.h>

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <atomic>
#include <string>

#include "../../csrc/core/subnormals.h"
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

bool find_openmp() {
  void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  gomp_parallel.store(reinterpret_cast<GompParallel>(symbol));
  return symbol != nullptr;
}

void choose_team(const std::string& name) {
  if (name == "own") return set_team(nullptr);
  if (name != "openmp") fail<InvalidArgument>("team", "'own' or 'openmp'", "'" + name + "'");
  if (!find_openmp()) fail<Unsupported>("team", "OpenMP (libgomp) loaded in this process", "none");
  set_team(openmp_team);
}

/// Of the calling thread; what it was before.
bool flush_here(bool on) {
  using subnormals::kFlush;
  const subnormals::Word before = subnormals::read();
  subnormals::write(on ? before | kFlush : before & ~kFlush);
  return kFlush != 0 && (before & kFlush) == kFlush;
}

bool flush_subnormals(bool on, int threads) {
  if (threads < 1 || threads > 1024) {
    fail<InvalidArgument>("threads", "1 to 1024", std::to_string(threads));
  }
  const bool before = flush_here(on);  // first: a thread begins as the one that starts it is
  if (threads > 1 && find_openmp()) {
    openmp_team([](void* data) { flush_here(*static_cast<bool*>(data)); }, &on, threads);
  }
  return before;
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
      .def_static(
          "flush_subnormals", &flush_subnormals, py::arg("on"), py::arg("threads") = 1,
          R"(Has arithmetic take floats below the normal range as zero, and returns if it did before.

Processors take a hundred times as long for them. Of the calling thread and of those of the OpenMP
runtime that this process has loaded (torch's) which work for it.

Args:
    on: False for what the standard asks for.
    threads: how many of them, the calling one included.

Raises:
    InvalidArgument: threads is not 1 to 1024.
)")
      .def_static("has_cuda", &has_cuda,
                  "Does this build compute on CUDA devices? Not whether there is one.")
      .def_static("version", &version, "Version of the core, major.minor.patch.");
}

}  // namespace secateur::python
