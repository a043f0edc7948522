"""A run on one screen: TOML and `key=value` overrides become a frozen dataclass, and every fault is told at once.

A recipe is a plain frozen dataclass; its field types are the schema. Unknown keys are errors, types are not coerced.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ownlm.errors import NotFound, RecipeError

R = TypeVar("R")


def read(
    cls: type[R], path: Path | None, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> R:
    """The recipe of class `cls` in the file `path` (none: the defaults alone), changed by `overrides` ("optimizer.lr=1e-3").

    Raises RecipeError with every fault, a line each; NotFound when there is no such file.
    """
    data: dict[str, Any] = _deep_copy(defaults or {})
    if path is not None:
        _merge(data, load(path))
    for override in overrides:
        set_value(data, override)
    return validate(cls, data, where=str(path) if path else "settings")


def load(path: Path) -> dict[str, Any]:
    """The TOML file as it stands."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.toml")], n=1)
        raise NotFound(
            f"there is no recipe {path}.", cure=f"Did you mean {path.parent / near[0]}?" if near else ""
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise RecipeError(f"not a TOML file: {fault}.", where=str(path)) from None


def validate(cls: type[R], data: Mapping[str, Any], *, where: str) -> R:
    """`data` as an instance of `cls`; `where` names the source in error sentences."""
    from pydantic import TypeAdapter, ValidationError

    try:
        # JSON mode is strict about types and still lets a list become a tuple and a string a Path.
        text = json.dumps(data, default=str)
        return TypeAdapter(cls).validate_json(text, strict=True, extra="forbid")
    except ValidationError as error:
        sentences = {_sentence(cls, data, fault) for fault in error.errors()}
        raise RecipeError("\n".join(f"{where}: {line}" for line in sorted(filter(None, sentences)))) from None


def resolve(recipe: Any) -> dict[str, Any]:
    """Every field with its value, as plain JSON types: what a manifest keeps."""
    from dataclasses import asdict

    data: dict[str, Any] = json.loads(json.dumps(asdict(recipe), default=str))
    return data


def set_value(data: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in nested tables: set_value({}, "model.num_layers=4") gives {"model": {"num_layers": 4}}."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"{override!r} is not key=value.", cure="Write for example optimizer.lr=1e-3.")
    *parents, name = key.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"{key} can't be set: {parent} is a value, not a table.")
    try:
        data[name] = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        data[name] = text  # a bare word: optimizer.kind=adamw


def _sentence(cls: Any, data: Any, fault: Any) -> str | None:
    """The fault in a sentence; None when it is about a member of a union that was not meant."""
    tables: list[Any] = [cls]
    path: list[str] = []
    for part in fault["loc"]:
        named = [table for table in tables if table.__name__ == part]
        if len(tables) > 1 and named:  # pydantic's own step: which member of the union it tried
            if named[0] is not _meant(tables, data):
                return None
            tables = named
            continue
        path.append(str(part))
        if part == fault["loc"][-1]:
            break
        hints = {key: hint for table in tables for key, hint in get_type_hints(table).items()}
        tables = [member for member in _members(hints.get(str(part))) if is_dataclass(member)] or tables
        data = data.get(part, {}) if isinstance(data, Mapping) else {}
    known = sorted({field.name for table in tables for field in fields(table)})
    where = ".".join(path)
    if fault["type"] in {"unexpected_keyword_argument", "extra_forbidden"}:
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{where} is not a field.{hint} Fields here: {', '.join(known)}."
    if fault["type"] in {"missing", "missing_argument"}:
        return f"{where} is missing."
    got = json.dumps(fault["input"], default=str)[:80]
    if fault["msg"].startswith("Input should be "):
        return f"{where} should be {fault['msg'].removeprefix('Input should be ')}, not {got}."
    return f"{where}: {fault['msg'].removeprefix('Value error, ')} (got {got})."


def _meant(tables: Sequence[Any], data: Any) -> Any:
    """The member of a union that the reader wrote: by its `kind`, else the first."""
    kind = data.get("kind") if isinstance(data, Mapping) else None
    return next((table for table in tables if kind in get_args(get_type_hints(table).get("kind"))), tables[0])


def _members(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, UnionType):
        for member in get_args(hint):
            yield from _members(member)
    elif hasattr(hint, "__metadata__"):  # Annotated
        yield from _members(get_args(hint)[0])
    else:
        yield hint


def _merge(into: dict[str, Any], data: Mapping[str, Any]) -> None:
    for key, value in data.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _deep_copy(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in data.items()}
