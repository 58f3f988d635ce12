// The exceptions of the library. Text: "<argument>: expected <what>, got <what>".
#pragma once

#include <secateur/export.h>

#include <stdexcept>

namespace secateur {

/// Base class of all exceptions that the library throws deliberately.
class SECATEUR_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument is invalid. Nothing has been changed.
class SECATEUR_API InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// The device (or the combination of arguments) is not supported by this build.
class SECATEUR_API Unsupported : public Error {
 public:
  using Error::Error;
};

/// NaN, Inf, or values whose statistics do not fit into float64.
class SECATEUR_API NumericalError : public Error {
 public:
  using Error::Error;
};

}  // namespace secateur
