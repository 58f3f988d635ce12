#include <pybind11/pybind11.h>

#include "bindings.h"

PYBIND11_MODULE(_core, module) {
  using namespace secateur::python;
  module.doc() = "The C++ core of secateur: scoring and cutting on buffers.";
  register_errors(module);
  register_attention_scorer(module);
  register_moment_accumulator(module);
  register_value_similarity(module);
  register_select(module);
  register_eliminate(module);
  register_compact(module);
  register_unpack(module);
  register_runtime(module);
}
