"""Options of methods and exporters, fields of a frozen dataclass: how they are shown, and --option NAME=VALUE read."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from ..errors import InvalidArgument

__all__ = ["TypedOption", "options_of", "parsed"]

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    tuple: "integers with commas between them",
}


@dataclass(frozen=True)
class TypedOption:
    """One option of a method or an exporter.

    ``choices`` are all values that it takes, of any type; without them a value is of the type ``kind``, where tuple is
    one of integers. ``optional`` options may also be None, "none" on the command line.
    """

    name: str
    default: Any
    kind: type
    choices: tuple[Any, ...] = ()
    optional: bool = False
    help: str = ""

    @property
    def values(self) -> str:
        """What it takes, in words."""
        words = ", ".join(map(str, self.choices)) if self.choices else _KINDS.get(self.kind, "a Python object")
        return f"{words}, or none" if self.optional else words

    def read(self, text: str) -> Any:
        """Return the value that a text stands for; its owner decides whether it is allowed.

        Raises:
            typer.BadParameter: it is not of the option's type.
        """
        if self.optional and text == "none":
            return None
        if self.choices:
            return next((value for value in self.choices if str(value) == text), text)
        try:
            if self.kind is bool:
                return {"true": True, "false": False}[text.lower()]
            if self.kind is tuple:
                return tuple(int(each) for each in text.split(","))
            return {int: int, float: float, str: str}[self.kind](text)
        except (KeyError, ValueError) as error:
            raise typer.BadParameter(f"expected {self.values} for --option {self.name}, got {text!r}") from error


def options_of(owner: Any) -> list[TypedOption]:
    """Return the options of a method or an exporter, the fields of its ``Options``."""
    hints = get_type_hints(owner.Options)
    return [
        _option(field.name, hints[field.name], field.default, field.metadata.get("help", ""))
        for field in fields(owner.Options)
    ]


def _option(name: str, hint: Any, default: Any, text: str) -> TypedOption:
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if optional:
        (hint,) = [each for each in get_args(hint) if each is not type(None)]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = type(choices[0]) if choices else tuple if hint == tuple[int, ...] else hint
    return TypedOption(name, None if default is MISSING else default, kind, choices, optional, text)


def parsed(owner: Any, given: Iterable[str] | None, flags: Mapping[str, str | None] | None = None) -> dict[str, Any]:
    """Read every NAME=VALUE of --option, and the values of flags that stand for options.

    Raises:
        typer.BadParameter: no NAME=VALUE, a name twice, or a value of another type.
        InvalidArgument: the owner has no such option.
    """
    texts = {name: text for name, text in (flags or {}).items() if text is not None}
    for each in given or ():
        name, equals, text = (part.strip() for part in each.partition("="))
        name = name.replace("-", "_")
        if not name or not equals:
            raise typer.BadParameter(f"expected --option NAME=VALUE, got {each!r}")
        if name in texts:
            raise typer.BadParameter(f"expected --option {name} once, got it twice")
        texts[name] = text
    known = {option.name: option for option in options_of(owner)}
    for name in texts:
        if name not in known:
            raise InvalidArgument(f"options: expected {', '.join(known) or 'none'}, got {name!r}")
    return {name: known[name].read(text) for name, text in texts.items()}
