"""What models run in, by name: engines that are timed, and formats that are written for engines.

The classes stand in folders above, and register themselves here, so that any folder can look one up by its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import InvalidArgument
from .registry import Registry

if TYPE_CHECKING:
    from .exports.base import Exporter
    from .latency.runtimes.base import Runtime

__all__ = ["EXPORTERS", "RUNTIMES", "preferred_layout"]

RUNTIMES: Registry[Runtime] = Registry(
    "runtime", "secateur.latency.runtimes", "secateur.runtimes", members=("prepare", "version")
)
EXPORTERS: Registry[Exporter] = Registry("format", "secateur.exports", "secateur.exporters", members=("export",))


def preferred_layout(engine: object) -> str:
    """Return what the exporter of this name says in ``layout``, or the runtime where there is no such exporter.

    The engine need not be installed. One that says nothing prefers "exact".

    Raises:
        InvalidArgument: neither an exporter nor a runtime has this name.
    """
    for registry in (EXPORTERS, RUNTIMES):
        if engine in registry.names():
            return getattr(registry.named(engine), "layout", "exact")
    names = sorted({*EXPORTERS.names(), *RUNTIMES.names()})
    raise InvalidArgument(f"engine: expected one of {', '.join(names)}, got {engine!r}")
