"""Write docs/reference: the public names of secateur and the command line, from the code itself.

    python docs/generate.py

The text depends on the code alone: not on the terminal's width, the machine, or the versions of Python and typer.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import typing
from collections.abc import Collection, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any

import secateur
import typer
from secateur.cli.app import app

FOLDER = Path(__file__).parent / "reference"
GENERATED = "<!-- Written by docs/generate.py. Edit the docstrings, then run it again. -->"
WIDTH = 100  # of a signature on one line
SECTIONS = {"Args": "Arguments", "Returns": "Returns", "Yields": "Yields", "Raises": "Raises"}
TYPERS = ("help", "install_completion", "show_completion")  # options that typer adds, in words of its own


def _public(name: str) -> Any:
    where = secateur._MODULES.get(name)
    return getattr(secateur if where is None else import_module(f"secateur.{where}"), name)


# --- Docstrings -------------------------------------------------------------------------------------------------------


def _prose(text: str) -> str:
    """Docstring markup as Markdown: double backquotes become single ones, and what Markdown would take is escaped."""
    text = re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split()))
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<])", r"\\\1", part) for part in parts)


def _entries(text: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, description) of a section in Google's style; what has no name comes with an empty one."""
    lines = text.strip("\n").split("\n")
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    name, found = "", list[str]()
    for line in lines:
        begins = re.match(rf" {{{margin}}}(\**\w+):(?:\s+(.*))?$", line)
        if begins and (not known or begins[1].strip("*") in known):
            if found:
                yield name, " ".join(found)
            name, found = begins[1], [begins[2] or ""]
        else:
            found.append(line)
    yield name, " ".join(found)


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if block.strip() and all(line.startswith("    ") for line in lines):
            yield "\n".join(["```python", *(line[4:] for line in lines), "```"])
        elif block.strip():
            yield _prose(block)


def _docstring(value: Any, parameters: Collection[str] = ()) -> Iterator[str]:
    blocks = re.split(r"^(Args|Returns|Yields|Raises):\s*$", inspect.getdoc(value) or "", flags=re.MULTILINE)
    yield from _paragraphs(blocks[0])
    for section, body in zip(blocks[1::2], blocks[2::2], strict=True):
        if section in ("Returns", "Yields"):
            yield f"**{SECTIONS[section]}:** {_prose(body)}"
            continue
        known = parameters if section == "Args" else ()
        yield f"**{SECTIONS[section]}**"
        yield "\n".join(
            f"- `{name}`: {_prose(text)}" if name else f"- {_prose(text)}" for name, text in _entries(body, known)
        )


# --- Signatures -------------------------------------------------------------------------------------------------------


def _annotation(value: Any) -> str:
    if value is inspect.Signature.empty:
        return ""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return text.replace('"', "").replace("'", "").replace("_Array", "Array")


def _default(value: Any) -> str:
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return "…" if text.startswith("<") else text  # a factory, a sentinel


def _written(parameter: inspect.Parameter) -> str:
    stars = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    kind = _annotation(parameter.annotation)
    text = f"{stars}{parameter.name}: {kind}" if kind else stars + parameter.name
    if parameter.default is not parameter.empty:
        text += (" = " if kind else "=") + _default(parameter.default)
    return text


def _call(name: str, value: Any, *, bound: bool = False) -> tuple[str, list[str]]:
    """How something is called, over several lines where that is long, and the names of its parameters."""
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())[int(bound) :]
    parts, starred = list[str](), False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or parameter.kind in (parameter.VAR_POSITIONAL, parameter.KEYWORD_ONLY)
        parts.append(_written(parameter))
    result = "" if inspect.isclass(value) else _annotation(signature.return_annotation)
    end = ")" if result in ("", "None") else f") -> {result}"
    line = f"{name}({', '.join(parts)}{end}"
    if len(line) > WIDTH:
        line = "\n".join([f"{name}(", *(f"    {part}," for part in parts), end])
    return line, [parameter.name for parameter in parameters]


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


# --- Python -----------------------------------------------------------------------------------------------------------


@functools.cache
def _stub() -> dict[str, Any]:
    """The compiled core as its stub describes it: what the binding says of itself depends on how it was built."""
    source = Path(secateur.__file__).with_name("_core.pyi").read_text()
    names: dict[str, Any] = {"__name__": "_core"}
    exec(compile("from __future__ import annotations\n" + source, "_core.pyi", "exec"), names)  # noqa: S102
    return names


def _function(name: str, value: Any, heading: str) -> Iterator[str]:
    line, parameters = _call(name, value)
    yield f"{heading} {name}()"
    yield _code(line)
    yield from _docstring(value, parameters)


def _members(name: str, value: type) -> Iterator[str]:
    """Yield what is public of a class, in the order of the source."""
    for child in dict.fromkeys(child for cls in value.__mro__[:-1] for child in vars(cls) if not child.startswith("_")):
        member = inspect.getattr_static(value, child)
        if isinstance(member, (property, functools.cached_property)):
            getter: Any = member.fget if isinstance(member, property) else member.func
            kind = _annotation(inspect.signature(getter).return_annotation)
            yield f"`.{child}: {kind}`" + (f": {_prose(about)}" if (about := inspect.getdoc(member)) else "")
        elif inspect.isroutine(member):
            static = isinstance(member, (staticmethod, classmethod))
            line, parameters = _call(f"{name if static else ''}.{child}", getattr(value, child), bound=not static)
            yield _code(line)
            yield from _docstring(getattr(value, child), parameters)


def _fields(name: str, value: Any) -> str:
    lines = (f"    {field.name}: {_annotation(field.type)}" for field in dataclasses.fields(value))
    return "\n".join([f"class {name}:", *lines])


def _class(name: str, value: type, heading: str) -> Iterator[str]:
    parameters: list[str] = []
    yield f"{heading} class {name}"
    if "Args:" in (value.__doc__ or "") or hasattr(value, "__post_init__"):  # made by its users
        line, parameters = _call(name, value)
        yield _code(line)
    elif dataclasses.is_dataclass(value):  # made by a function
        yield _code(_fields(name, value))
    yield from _docstring(value, parameters)
    yield from _members(name, value)


def _exception(name: str, value: type[Exception]) -> Iterator[str]:
    yield f"## exception {name}"
    bases = " and ".join(f"`{base.__name__}`" for base in value.__bases__)
    yield f"Derives from {bases}."
    yield from _docstring(value)


def _module(name: str, value: ModuleType) -> Iterator[str]:
    yield f"## module {name}"
    yield from _docstring(value)
    compiled = _stub() if value is secateur.core else {}
    for child in value.__all__:
        found = compiled.get(child, getattr(value, child))
        yield from (_class if inspect.isclass(found) else _function)(f"{name}.{child}", found, "###")


def _kind_of(value: Any) -> str:
    if isinstance(value, ModuleType):
        return "module"
    if inspect.isclass(value):
        return "exception" if issubclass(value, Exception) else "class"
    return "function"


def api() -> str:
    """The reference of the package."""
    # From where they are defined: the package "methods" takes that function's place once it is imported.
    values = {name: _public(name) for name in sorted(secateur.__all__)}
    parts = [
        "# Python reference",
        GENERATED,
        _code("import secateur as sc"),
        "What each name is for, and how they fit together, is in [Script it](../guides/script_it.md).",
    ]
    titles = {"function": "Functions", "class": "Classes", "exception": "Exceptions", "module": "Modules"}
    for kind, title in titles.items():
        prefix = "" if kind == "function" else f"{kind}-"
        links = [f"[`{name}`](#{prefix}{name.lower()})" for name, value in values.items() if _kind_of(value) == kind]
        parts.append(f"{title}: {', '.join(links)}.")
    for kind in titles:
        for name, value in values.items():
            if kind != _kind_of(value):
                continue
            if kind == "function":
                parts += _function(name, value, "##")
            elif kind == "class":
                parts += _class(name, value, "##")
            else:
                parts += _exception(name, value) if kind == "exception" else _module(name, value)
    return "\n\n".join(parts) + "\n"


# --- The command line -------------------------------------------------------------------------------------------------


def _value_of(parameter: Any, kinds: dict[str, Any]) -> str:
    """What stands for the value of an option."""
    if parameter.metavar:
        return str(parameter.metavar)
    kind: Any = kinds.get(parameter.name)
    kind = next((each for each in typing.get_args(kind) if each is not NoneType), kind)
    return {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}.get(kind, "VALUE")


def _option_row(option: Any, kinds: dict[str, Any]) -> str:
    names = "/".join([*option.opts, *option.secondary_opts])
    text = names if option.is_flag else f"{names} {_value_of(option, kinds)}"
    about = [_prose(option.help or "")]
    if option.required:
        about.insert(0, "**Required.**")
    elif option.is_flag and option.secondary_opts and option.default is not None:
        about.append(f"Default: `{(option.opts if option.default else option.secondary_opts)[0]}`.")
    elif not option.is_flag and option.default not in (None, "", ()):
        about.append(f"Default: `{option.default}`.")
    return "| `{}` | {} |".format(*(each.replace("|", r"\|") for each in (text, " ".join(filter(None, about)))))


def _tables(command: Any, kinds: dict[str, Any]) -> Iterator[str]:
    """Yield tables of arguments and options, one a panel of the help."""
    panels: dict[str, list[str]] = {"Arguments": [], "Options": []}
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name in TYPERS:
            continue
        if parameter.opts[0].startswith("-"):
            panel = getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(_option_row(parameter, kinds))
        else:
            about = _prose(getattr(parameter, "help", None) or "")
            panels["Arguments"].append(f"| `{parameter.name.upper()}` | {about} |")
    for panel, rows in panels.items():
        if rows:
            yield "\n".join([f"| {panel} | |", "|---|---|", *rows])


def _command_page(name: str, command: Any) -> Iterator[str]:
    kinds = typing.get_type_hints(inspect.unwrap(command.callback))
    words = ["secateur", name]
    for each in command.params:
        if not each.opts[0].startswith("-"):
            words.append(each.name.upper() if each.required else f"[{each.name.upper()}]")
        elif each.required:
            words.append(f"{each.opts[0]} {_value_of(each, kinds)}")
    yield f"## secateur {name}"
    yield "```text\n" + " ".join([*words, "[OPTIONS]"]) + "\n```"
    yield from _paragraphs(inspect.cleandoc(command.help or ""))
    yield from _tables(command, kinds)


def cli() -> str:
    """The reference of the command line."""
    root: Any = typer.main.get_command(app)
    context: Any = None  # nothing was called
    commands = {name: root.get_command(context, name) for name in root.list_commands(context)}
    commands = {name: command for name, command in commands.items() if not command.hidden}
    parts = [
        "# Command-line reference",
        GENERATED,
        _prose(root.help or ""),
        "`secateur COMMAND --help` prints the same. Every command exits with 0 (done), 1 (failed) or 2 (wrong usage).",
        f"Commands: {', '.join(f'[`{name}`](#secateur-{name})' for name in commands)}.",
        *_tables(root, {}),
    ]
    for name, command in commands.items():
        parts += _command_page(name, command)
    return "\n\n".join(parts) + "\n"


def pages() -> dict[Path, str]:
    """The text of each page."""
    return {FOLDER / "api.md": api(), FOLDER / "cli.md": cli()}


def main() -> int:
    """Write the pages, and say which changed."""
    FOLDER.mkdir(exist_ok=True)
    for path, text in pages().items():
        changed = not path.is_file() or path.read_text() != text
        path.write_text(text)
        sys.stdout.write(f"{path}: {'changed' if changed else 'unchanged'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
