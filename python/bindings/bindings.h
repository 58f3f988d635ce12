// One register_*() per file of this folder.
#pragma once

#include <pybind11/pybind11.h>

namespace secateur::python {

void register_errors(pybind11::module_& module);
void register_attention_scorer(pybind11::module_& module);
void register_moment_accumulator(pybind11::module_& module);
void register_value_similarity(pybind11::module_& module);
void register_select(pybind11::module_& module);
void register_eliminate(pybind11::module_& module);
void register_compact(pybind11::module_& module);
void register_runtime(pybind11::module_& module);
void register_unpack(pybind11::module_& module);

}  // namespace secateur::python
