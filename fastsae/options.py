"""Options of the command line that come from elsewhere: a TOML or JSON file, a run to be resumed.

A file names options as the command line does, with underscores (``d_sae = 4096``); ``selection`` is
a rule's name, or a table with its name and parameters. They become arguments in front of those that
were typed, so that what is typed overrides them.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsae.files import read_json
from fastsae.selection import Selection

Hints = Mapping[str, Any]


def rule_from(name: str, k: int, parameters: Mapping[str, Any]) -> Selection:
    """The rule of that name; parameters by name, texts as JSON or, if they are not, as they are."""
    rule = Selection.named(name)
    known = [f.name for f in fields(rule)]
    values: dict[str, Any] = {rule.k_name: k} if rule.k_name else {}
    if parameters.get("l0_target") is not None:  # the other way to steer JumpReLU
        values.pop("l0", None)
    for parameter, value in parameters.items():
        if parameter not in known:
            raise ValueError(
                f"selection.{parameter}: {name} has the parameters {', '.join(known)}, no such one"
            )
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                pass
        values[parameter] = value
    return Selection.from_dict({"name": name, **values})


def selection_parameters(args: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes --selection.PARAM VALUE and --selection.PARAM=VALUE out of the arguments."""
    rest: list[str] = []
    found: dict[str, Any] = {}
    arguments = iter(args)
    for argument in arguments:
        if not argument.startswith("--selection."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--selection.").partition("=")
        text = value if equals else next(arguments, None)
        if text is None:
            raise ValueError(f"--selection.{name}: expected a value after it, got none")
        found[name.replace("-", "_")] = text
    return rest, found


def typed(args: list[str], name: str) -> str | None:
    """The value of --NAME among the arguments, the last one; None where it is not there."""
    value = None
    for i, argument in enumerate(args):
        if argument == f"--{name}" and i + 1 < len(args):
            value = args[i + 1]
        elif argument.startswith(f"--{name}="):
            value = argument.partition("=")[2]
    return value


def read_options(path: Path, hints: Hints) -> dict[str, Any]:
    """The options in a .toml or .json file. ValueError names the file, the option, what is wrong.

    hints: the type of every option there is.
    """
    return checked(read_table(path), hints, str(path))


def read_table(path: Path) -> dict[str, Any]:
    """What a .toml or .json file holds. ValueError: it is not readable."""
    return _toml(path) if path.suffix == ".toml" else read_json(path)


def checked(options: dict[str, Any], hints: Hints, where: str) -> dict[str, Any]:
    """The options themselves. ValueError: one there is not, or of another type, said of `where`."""
    for name, value in options.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            shown = name if name.isidentifier() else repr(name)
            raise ValueError(f"{where}: {shown:.80}: there is no such option{meant}")
        if name == "selection" and isinstance(value, dict):
            if not isinstance(value.get("name"), str):
                raise ValueError(f"{where}: selection: expected a table with a name, got {value!r}")
        elif not _fits(value, hints[name]):
            kinds = " or ".join(_kinds(hints[name]))
            raise ValueError(f"{where}: {name}: expected {kinds}, got {value!r:.80}")
    return options


def as_arguments(options: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Options as arguments, and the parameters of the selection rule among them."""
    arguments: list[str] = []
    parameters: dict[str, Any] = {}
    for name, value in options.items():
        if name == "selection" and isinstance(value, dict):
            parameters = {key: v for key, v in value.items() if key != "name"}
            value = value["name"]
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments.append(f"--{option}={value}")
    return arguments, parameters


def _toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:
        raise ValueError(f"{path}: expected .json: TOML needs Python 3.11") from None
    try:
        if not path.is_file():
            raise ValueError(f"{path}: no such file, or not a regular file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as TOML: {str(error)[:120]}") from None


def _alternatives(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _alternatives(part)
    else:
        yield hint


def _fits(value: Any, hint: Any) -> bool:
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is typing.Literal:
            if isinstance(value, str) and value in typing.get_args(kind):
                return True
        elif typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            if isinstance(value, list) and all(_fits(item, inner) for item in value):
                return True
        elif kind is float:
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif kind in (str, Path):
            if isinstance(value, str) and "\0" not in value:
                return True
        elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return True
    return False


def _kinds(hint: Any) -> Iterator[str]:
    names = {int: "an integer", float: "a number", bool: "true or false", Path: "a path"}
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is typing.Literal:
            yield ", ".join(typing.get_args(kind))
        elif typing.get_origin(kind) is tuple:
            yield "a list"
        elif kind is type(None):
            yield "null"
        else:
            yield names.get(kind, "a text")
