"""`secateur methods`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

import secateur as sc

from . import lazy
from .options import Json
from .output import collected
from .typed_options import options_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ..methods.base import Method
    from .typed_options import TypedOption

__all__ = ["methods"]


def methods(
    name: Annotated[str | None, typer.Argument(help="Describe this method.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the pruning methods, or describe one: its paper, what it needs, and its options."""
    with collected(as_json) as output:
        if name is None:
            found = {each: _summary(lazy.method_named(each)) for each in sc.methods()}
            output.show(*_columns(found.items()), methods=[{"name": each, "summary": found[each]} for each in found])
            return
        method = lazy.method_named(name)
        options = options_of(method)
        lines = [
            f"{name}: {_summary(method)}",
            f"Paper: {method.paper}",
            f"Statistics it needs: {', '.join(method.needs) or 'none'}",
            f"Changes weights: {'yes' if method.changes_weights else 'no'}",
            "Options, each as --option NAME=VALUE:" if options else "Options: none",
            *_described(options),
        ]
        output.show(
            *lines,
            name=name,
            summary=_summary(method),
            paper=method.paper,
            needs=list(method.needs),
            changes_weights=method.changes_weights,
            options=[_fields(option) for option in options],
        )


def _summary(method: Method) -> str:
    """Return the first paragraph of a method's description, on one line."""
    paragraph, _, _ = (inspect.getdoc(method) or "").partition("\n\n")
    return " ".join(paragraph.split())


def _described(options: Sequence[TypedOption]) -> Iterator[str]:
    """Each option with its values, and its help below them."""
    width = max((len(option.name) for option in options), default=0)
    for option in options:
        yield f"  {option.name:<{width}}  {option.values}; {_text(option.default)} by default"
        if option.help:
            yield f"  {'':<{width}}  {option.help}"


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _fields(option: TypedOption) -> dict[str, Any]:
    return {
        "name": option.name,
        "type": getattr(option.kind, "__name__", str(option.kind)),
        "values": list(option.choices) or None,
        "optional": option.optional,
        "default": option.default,
        "help": option.help,
    }


def _columns(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Lay out names and texts in two columns."""
    rows = list(pairs)
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {text}" for name, text in rows]
