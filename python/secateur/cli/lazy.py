"""What commands use besides the public names, imported when it is first asked for.

`secateur plan --help` waits for no torch that way.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import set_num_threads

    from ..exports.base import exporters, path_for
    from ..methods.registry import method_named
    from ..runtime.devices import place_for
    from ..runtime.ranks import first, joined
    from ..searches.result import check_figure
    from ..surgery.stock_layout import chosen_layout
    from .digits import demo
    from .model import model_from, said

_MODULES = {
    "check_figure": "secateur.searches.result",
    "chosen_layout": "secateur.surgery.stock_layout",
    "demo": "secateur.cli.digits",
    "exporters": "secateur.exports.base",
    "first": "secateur.runtime.ranks",
    "joined": "secateur.runtime.ranks",
    "method_named": "secateur.methods.registry",
    "model_from": "secateur.cli.model",
    "path_for": "secateur.exports.base",
    "place_for": "secateur.runtime.devices",
    "said": "secateur.cli.model",
    "set_num_threads": "torch",
}
__all__ = [
    "check_figure",
    "chosen_layout",
    "demo",
    "exporters",
    "first",
    "joined",
    "method_named",
    "model_from",
    "path_for",
    "place_for",
    "said",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
