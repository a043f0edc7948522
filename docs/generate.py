"""Write docs/reference/ from the code: the command line, the recipes and the Python API. `--check` fails when it is stale."""

import ast
import inspect
import os
import sys
import textwrap
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import ownlm
from ownlm import cli, pipeline

REFERENCE = Path(__file__).parent / "reference"
WRITTEN_BY = (3, 11)  # the oldest supported
NOTE = "<!-- Written by docs/generate.py from the code. Change the code, then run `make docs`. -->\n"


def command_line() -> str:
    """Every command with its help, as the terminal shows it."""
    os.environ["COLUMNS"] = "100"
    os.environ["NO_COLOR"] = "1"
    parser = cli.make_parser()
    parts = [NOTE, "# Command line\n", fenced(parser.format_help())]
    for name, child in cli.children(parser).items():
        parts += [f"## ownlm {name}\n", fenced(child.format_help())]
    return "\n".join(parts)


def recipes() -> str:
    """Every table of a recipe: its fields with type, default and meaning."""
    parts = [NOTE, "# Recipes\n", "A recipe is one TOML file for one run. Unknown keys are errors.\n"]
    seen: set[type] = set()
    waiting: list[tuple[str, type]] = [("", pipeline.Recipe)]
    while waiting:
        path, table = waiting.pop(0)
        hints = typing.get_type_hints(table)
        title = f"[{path}]" if path else "the file"
        parts += [f"## {title}: {table.__name__}\n", inspect.cleandoc(table.__doc__ or "") + "\n"]
        if table in seen:
            parts.append("(as above)\n")
            continue
        seen.add(table)
        parts += ["| field | type | default | meaning |", "|---|---|---|---|"]
        comments = field_comments(table)
        for field in fields(table):
            hint = hints[field.name]
            waiting += [(f"{path}.{field.name}".strip("."), member) for member in members(hint) if is_dataclass(member)]
            parts.append(f"| {field.name} | {type_name(hint)} | {default(field)} | {comments.get(field.name, '')} |")
        parts.append("")
    return "\n".join(parts)


def python_api() -> str:
    """Every public name with its signature and docstring."""
    parts = [NOTE, "# Python\n", "`import ownlm` is light; each name loads what it needs when it is first used.\n"]
    for name in ownlm.__all__:
        thing = getattr(ownlm, name)
        parts += [f"## ownlm.{name}\n", described(name, thing)]
        if inspect.isclass(thing) and not is_dataclass(thing) and not issubclass(thing, Exception):
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                if not method.startswith("_") and function.__doc__:
                    parts += [f"### {name}.{method}\n", described(method, function)]
    return "\n".join(parts)


def described(name: str, thing: Any) -> str:
    signature = "" if isinstance(thing, dict) else f"{name}{inspect.signature(thing)}"
    signature = signature.replace("ownlm.records.", "").replace("pathlib._local.", "").replace("pathlib.", "")
    return (
        fenced(textwrap.fill(signature, 100, subsequent_indent="    "))
        + "\n"
        + inspect.cleandoc(thing.__doc__ or "")
        + "\n"
    )


def field_comments(table: type) -> dict[str, str]:
    """The comment behind each field, which is where the code explains it."""
    source = textwrap.dedent(inspect.getsource(table))
    lines = source.splitlines()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = lines[(node.end_lineno or node.lineno) - 1]
            found[node.target.id] = text.partition("  # ")[2].replace("|", "\\|")
    return found


def members(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, UnionType):
        return [inner for member in get_args(hint) for inner in members(member)]
    return [hint]


def type_name(hint: Any) -> str:
    if get_origin(hint) is typing.Literal:
        return " \\| ".join(f'"{value}"' for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " \\| ".join("none" if member is type(None) else type_name(member) for member in get_args(hint))
    if get_origin(hint):
        return f"{get_origin(hint).__name__}[{', '.join('…' if a is ... else type_name(a) for a in get_args(hint))}]"
    return str(getattr(hint, "__name__", hint))


def default(field: Any) -> str:
    if field.default is not MISSING:
        return f"a table, {type(field.default).__name__}" if is_dataclass(field.default) else f"`{field.default!r}`"
    return "required" if field.default_factory is MISSING else f"`{field.default_factory()!r}`"


def fenced(text: str) -> str:
    return f"```\n{text.strip()}\n```\n"


PAGES = {"command-line.md": command_line, "recipes.md": recipes, "python.md": python_api}


def main() -> int:
    if "--check" in sys.argv and sys.version_info[:2] != WRITTEN_BY:
        print(
            f"docs/reference is checked on Python {WRITTEN_BY[0]}.{WRITTEN_BY[1]} only: others format help differently."
        )
        return 0
    stale = []
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        text = page().rstrip() + "\n"
        path = REFERENCE / name
        if "--check" in sys.argv:
            stale += [name] if not path.exists() or path.read_text() != text else []
        else:
            path.write_text(text)
    if stale:
        print(f"docs/reference is stale ({', '.join(stale)}): run `make docs`.", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
