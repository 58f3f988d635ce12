"""Registries of classes that arguments refer to by name; classes register themselves, here and in other packages."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import InvalidArgument

__all__ = ["Registry"]

T = TypeVar("T")
C = TypeVar("C", bound=type[Any])


class Registry(Generic[T]):
    """Classes by their ``name``, one instance of each.

    A class registers itself with the decorator ``register``. The modules of ``package`` are imported when a name is
    first looked up. Another package declares its class as an entry point of ``group``, under the name of the class; it
    is imported when that name is looked up, so that a broken package breaks nothing else.

    Args:
        argument: the argument that takes these names, for error texts, such as "runtime".
        package: the package whose modules register classes, such as "secateur.latency.runtimes".
        group: the group of entry points, such as "secateur.runtimes".
        members: attributes that a class must have besides ``name``.
    """

    def __init__(self, argument: str, package: str, group: str, members: tuple[str, ...] = ()) -> None:
        self._argument, self._package, self._group, self._members = argument, package, group, members
        self._found: dict[str, T] = {}
        self._complete = False
        self._outside: dict[str, EntryPoint] | None = None
        self._loaded: set[str] = set()

    def register(self, cls: C) -> C:
        """Register a class; used as a decorator. A class that is defined again, as in a notebook, replaces the first.

        Raises:
            InvalidArgument: not a class, a class without a name or a member, or a name that another class has.
        """
        if not isinstance(cls, type):
            raise InvalidArgument(f"{self._argument}: expected a class to register, got {cls!r}")
        where = f"{cls.__module__}.{cls.__qualname__}"
        name = getattr(cls, "name", None)
        if not isinstance(name, str) or not name:
            raise InvalidArgument(f"{self._argument}: expected a class with a name, got {where} whose name is {name!r}")
        for member in self._members:
            if not hasattr(cls, member):
                raise InvalidArgument(f"{self._argument}: expected a class with {member}, got {where} without")
        if not f"{cls.__module__}.".startswith(f"{self._package}."):
            self._import_package()  # so that its names are taken
        if name in self._found:
            before = type(self._found[name])
            if (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
                taken = f"{before.__module__}.{before.__qualname__}"
                raise InvalidArgument(f"{self._argument}: expected one class named {name!r}, got {where} and {taken}")
        self._found[name] = cls()
        return cls

    def names(self) -> list[str]:
        """Return all names, sorted; entry points are listed but not imported."""
        self._import_package()
        return sorted({*self._found, *self._entry_points()})

    def named(self, name: object, argument: str | None = None) -> T:
        """Return the instance with this name; errors are of ``argument``, by default the registry's own.

        Raises:
            InvalidArgument: there is none; or an entry point of this name cannot be imported, registers no class of
                this name, or has the name of a class that is already registered.
        """
        self._import_package()
        if isinstance(name, str):
            self._load(name)
            if name in self._found:
                return self._found[name]
        raise InvalidArgument(f"{argument or self._argument}: expected one of {', '.join(self.names())}, got {name!r}")

    def __iter__(self) -> Iterator[T]:
        """Iterate over all instances in the order of registration; entry points come last and are then imported."""
        self._import_package()
        names = list(self._found)
        yield from (self._found[name] for name in names)
        yield from (self.named(name) for name in self.names() if name not in names)

    def _import_package(self) -> None:
        if self._complete:
            return
        self._complete = True
        try:
            for module in pkgutil.iter_modules(import_module(self._package).__path__, f"{self._package}."):
                import_module(module.name)
        except BaseException:
            self._complete = False
            raise

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._outside is None:
            self._outside = {}
            # Read only once, since the metadata of all packages take milliseconds.
            for found in entry_points(group=self._group):
                before = self._outside.setdefault(found.name, found)
                if before.value != found.value:
                    self._outside = None
                    raise InvalidArgument(
                        f"{self._argument}: expected one entry point named {found.name!r} in {self._group}, "
                        f"got {before.value} and {found.value}"
                    )
        return self._outside

    def _load(self, name: str) -> None:
        """Import the entry point of this name once, if there is one."""
        entry = self._entry_points().get(name)
        if entry is None or name in self._loaded:
            return
        where = f"{entry.value} in the entry points {self._group}"
        try:
            loaded = entry.load()
        except Exception as error:  # code of others can raise anything
            reason = f"{type(error).__name__}: {error}"
            raise InvalidArgument(f"{self._argument}: expected {where} to be importable, got {reason}") from error
        if isinstance(loaded, type) and not any(type(found) is loaded for found in self._found.values()):
            self.register(loaded)
        if name not in self._found or (isinstance(loaded, type) and type(self._found[name]) is not loaded):
            raise InvalidArgument(f"{self._argument}: expected {where} to register {name!r}, got none of this name")
        self._loaded.add(name)
