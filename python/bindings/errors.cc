// The library's exceptions as the classes of secateur.errors.
#include <secateur/error.h>

#include <exception>

#include "bindings.h"

namespace py = pybind11;

namespace secateur::python {
namespace {

void raise(const char* name, const std::exception& error) {
  py::set_error(py::module_::import("secateur.errors").attr(name), error.what());
}

}  // namespace

void register_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      std::rethrow_exception(pointer);
    } catch (const InvalidArgument& error) {
      raise("InvalidArgument", error);
    } catch (const Unsupported& error) {
      raise("Unsupported", error);
    } catch (const NumericalError& error) {
      raise("NumericalError", error);
    } catch (const Error& error) {
      raise("Error", error);
    }
  });
}

}  // namespace secateur::python
