// The errors of the type conversion: the library's classes and its form of text.
#pragma once

#include <pybind11/pybind11.h>
#include <secateur/error.h>
#include <secateur/tensor.h>

#include <string>

namespace secateur::python {

template <typename E>
[[noreturn]] void fail(const std::string& argument, const std::string& expected,
                       const std::string& got) {
  throw E(argument + ": expected " + expected + ", got " + got);
}

inline std::string type_name(pybind11::handle object) {
  return pybind11::str(pybind11::type::handle_of(object).attr("__name__"));
}

/// Whether an error of Python's says something about what was given: a key that was pressed, an
/// exit and a lack of memory do not.
inline bool is_refusal(const pybind11::error_already_set& error) {
  return error.matches(PyExc_Exception) && !error.matches(PyExc_MemoryError);
}

[[noreturn]] inline void refuse_dtype(const std::string& argument, const std::string& got) {
  fail<InvalidArgument>(argument, "dtype float32, float16, bfloat16 or float64", got);
}

inline void check_rank(std::size_t rank, const std::string& argument) {
  if (rank <= kMaxRank) return;
  fail<InvalidArgument>(argument, "at most " + std::to_string(kMaxRank) + " dimensions",
                        std::to_string(rank));
}

}  // namespace secateur::python
