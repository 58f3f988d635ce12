"""The exceptions of secateur; the C++ core raises the same classes."""


class Error(Exception):
    """Base class of all exceptions that secateur raises deliberately."""


class InvalidArgument(Error, ValueError):
    """An argument is invalid; the text is ``<argument>: expected <what>, got <what>``."""


class Unsupported(Error):
    """The model, module, device or combination is not supported; the text names it and the reason."""


class NumericalError(Error, ArithmeticError):
    """A computation met NaN or Inf, or a system without a usable solution."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, or the name of its class if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
