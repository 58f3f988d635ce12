"""The options of a method: what `secateur methods NAME` shows of them, and how --option NAME=VALUE is read."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

from ..errors import InvalidArgument
from . import lazy

if TYPE_CHECKING:
    from ..methods.base import Method

__all__ = ["MethodOption", "options_of", "parsed"]

_KINDS: dict[type, str] = {bool: "true or false", int: "an integer", float: "a number"}


@dataclass(frozen=True)
class MethodOption:
    """One option of a method.

    ``choices`` are all values that it takes, of any type; where there are none, a value is of the type ``kind``.
    ``optional`` says that it may also be None, "none" on the command line.
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
        words = ", ".join(map(str, self.choices)) if self.choices else _KINDS.get(self.kind, "a text")
        return f"{words}, or none" if self.optional else words

    def read(self, text: str) -> Any:
        """Return the value that a text stands for; whether a method takes it is for the method to say.

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
            return self.kind(text) if self.kind in (int, float) else text
        except (KeyError, ValueError) as error:
            raise typer.BadParameter(f"expected {self.values} for --option {self.name}, got {text!r}") from error


def options_of(method: Method) -> list[MethodOption]:
    """Return a method's options: the fields of its ``Options``, a frozen dataclass."""
    hints = get_type_hints(method.Options)
    return [
        _option(field.name, hints[field.name], field.default, field.metadata.get("help", ""))
        for field in fields(method.Options)
    ]


def _option(name: str, hint: Any, default: Any, text: str) -> MethodOption:
    optional = get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)
    if optional:
        (hint,) = [each for each in get_args(hint) if each is not type(None)]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = type(choices[0]) if choices else hint
    return MethodOption(name, None if default is MISSING else default, kind, choices, optional, text)


def parsed(method: str, given: Iterable[str] | None, flags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Read every NAME=VALUE of --option, and the values of flags that stand for options.

    Raises:
        typer.BadParameter: no NAME=VALUE, a name twice, or a value of another type.
        InvalidArgument: no such method, or it has no such option.
    """
    texts = dict(flags or {})
    for each in given or ():
        name, equals, text = (part.strip() for part in each.partition("="))
        name = name.replace("-", "_")
        if not name or not equals:
            raise typer.BadParameter(f"expected --option NAME=VALUE, got {each!r}")
        if name in texts:
            raise typer.BadParameter(f"expected --option {name} once, got it twice")
        texts[name] = text
    known = {option.name: option for option in options_of(lazy.method_named(method))}
    for name in texts:
        if name not in known:
            raise InvalidArgument(f"options: expected {', '.join(known) or 'none'}, got {name!r}")
    return {name: known[name].read(text) for name, text in texts.items()}
