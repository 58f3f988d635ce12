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
    from collections.abc import Iterator, Sequence

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
            found = {each: lazy.method_named(each) for each in sc.methods()}
            rows = [(each, ", ".join(method.needs) or "weights", _summary(method)) for each, method in found.items()]
            output.show(*_columns(rows), methods=[{"name": each, **_facts(method)} for each, method in found.items()])
            return
        method = lazy.method_named(name)
        options = options_of(method)
        lines = [
            f"{name}: {_summary(method)}",
            f"Paper: {method.paper}",
            f"Source: {method.source}",
            f"Statistics it needs: {', '.join(method.needs) or 'none'}",
            f"Images: {_yes(method.needs)}; labels: no; gradients: {_yes('gradients' in method.needs)}; training: no",
            f"Cuts: {', '.join(method.cuts)}",
            f"Changes weights: {'yes' if method.changes_weights else 'no'}",
            "Options, each as --option NAME=VALUE:" if options else "Options: none",
            *_described(options),
        ]
        output.show(
            *lines,
            name=name,
            **_facts(method),
            options=[_fields(option) for option in options],
        )


def _facts(method: Method) -> dict[str, Any]:
    return {
        "summary": _summary(method),
        "paper": method.paper,
        "source": method.source,
        "needs": list(method.needs),
        "cuts": list(method.cuts),
        "changes_weights": method.changes_weights,
    }


def _yes(value: object) -> str:
    return "yes" if value else "no"


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


def _columns(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Lay out names, what is needed, and texts in columns."""
    first, second = (max((len(row[index]) for row in rows), default=0) for index in (0, 1))
    return [f"{name:<{first}}  {needs:<{second}}  {text}" for name, needs, text in rows]
