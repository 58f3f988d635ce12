"""The C++ core, for scripts that own their buffers: NumPy and torch arrays of any strides, without copies."""

from pathlib import Path

from .. import _core
from .._core import (
    AttentionScorer,
    MomentAccumulator,
    compact,
    eliminate,
    runtime,
    select,
    unpack,
    value_similarity,
    value_similarity_from_moment,
)
from ..errors import Unsupported

__all__ = [
    "AttentionScorer",
    "MomentAccumulator",
    "cmake_dir",
    "compact",
    "eliminate",
    "runtime",
    "select",
    "unpack",
    "value_similarity",
    "value_similarity_from_moment",
]


def cmake_dir() -> Path:
    """Return the folder of the CMake package that this installation provides for C++ programs.

    With ``cmake -Dsecateur_DIR=<folder>``, ``find_package(secateur CONFIG)`` finds the headers and the shared library.

    Raises:
        Unsupported: the package was built without it.
    """
    # Beside the extension, since the Python files of an editable install are elsewhere.
    folder = Path(_core.__file__).parent / "lib" / "cmake" / "secateur"
    if not (folder / "secateurConfig.cmake").is_file():
        raise Unsupported(f"cmake_dir: expected a package built with SECATEUR_INSTALL=ON, got none in {folder}")
    return folder
