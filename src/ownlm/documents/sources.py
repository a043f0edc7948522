"""Sources: a folder of files -> raw texts and conversations, one by one; what can't be read becomes a reason.

    txt md rst ... source code     one document per file        jsonl json parquet csv    one per record or row
    html                           its main text (trafilatura)  any of them with .gz

A record is a document by its field `text` or `content`, a conversation by its `messages`. No file, however broken, stops
the others: links that turn in circles, pipes, unreadable, binary, undecodable and over-large files are counted and passed.
"""

import csv
import gzip
import io
import json
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ownlm.records import Conversation, Message, Role

TEXT_FIELDS = ("text", "content")
PROSE = {"txt", "text", "md", "markdown", "rst", "tex", "org", "adoc", "log", "srt"}
HTML = {"html", "htm", "xhtml"}
# Extension -> programming language, by the names GitHub uses.
CODE = {
    extension: language
    for language, extensions in {
        "python": "py pyi pyx",
        "c": "c h",
        "c++": "cc cpp cxx hpp hh hxx cu",
        "c#": "cs",
        "java": "java",
        "kotlin": "kt kts",
        "scala": "scala sc",
        "javascript": "js mjs cjs jsx",
        "typescript": "ts tsx",
        "go": "go",
        "rust": "rs",
        "ruby": "rb",
        "php": "php",
        "perl": "pl pm",
        "shell": "sh bash zsh fish",
        "powershell": "ps1",
        "sql": "sql",
        "r": "r",
        "julia": "jl",
        "lua": "lua",
        "swift": "swift",
        "objective-c": "m mm",
        "dart": "dart",
        "haskell": "hs",
        "ocaml": "ml mli",
        "f#": "fs fsx",
        "clojure": "clj cljs",
        "elixir": "ex exs",
        "erlang": "erl hrl",
        "fortran": "f f90 f95",
        "pascal": "pas",
        "assembly": "s asm",
        "zig": "zig",
        "nim": "nim",
        "lisp": "lisp el scm rkt",
        "css": "css scss less",
        "vue": "vue",
        "svelte": "svelte",
        "cmake": "cmake",
        "make": "mk",
        "yaml": "yaml yml",
        "toml": "toml",
        "protobuf": "proto",
    }.items()
    for extension in extensions.split()
}
NAMED_CODE = {"makefile": "make", "dockerfile": "dockerfile", "cmakelists.txt": "cmake"}
RECORDS = {"jsonl", "ndjson", "json", "csv", "tsv", "parquet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A text as it was found. `code` is its programming language, None for prose."""

    text: str
    source: str
    type: str
    code: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A file, record or document that was left out, and why."""

    source: str
    reason: str


class Unusable(Exception):
    """A file or record that can't be used; the message is the reason that is counted."""


def find_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """(path, name relative to the folder) of every file, in the order of names. Hidden files and folders are passed over;
    a folder reached a second time through a link is not entered again."""
    seen: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                path = Path(root) / name
                # A name need not be UTF-8; the records that keep it must be.
                yield (
                    path,
                    path.relative_to(folder).as_posix().encode(errors="surrogateescape").decode(errors="replace"),
                )


def read_file(path: Path, name: str, *, max_bytes: int) -> Iterator[Raw | Conversation | Dropped]:
    """What a file holds. Never raises for what is wrong with the file."""
    try:
        extension, packed = _kind(path.name)
        if not stat.S_ISREG(path.stat().st_mode):
            raise Unusable("not a regular file")
        if extension == "parquet":
            yield from _parquet(path, name)
        elif extension in RECORDS and extension not in {"csv", "tsv", "json"}:
            yield from _jsonl(path, name, packed, max_bytes)
        else:
            code = NAMED_CODE.get(path.name.lower()) or CODE.get(extension)
            if not (code or extension in PROSE or extension in HTML or extension in RECORDS or not extension):
                raise Unusable("unknown type")
            text = _decode(_read(path, packed, max_bytes))
            if extension in RECORDS:
                yield from _table(text, name, extension)
            elif extension in HTML:
                yield Raw(text=_main_text(text), source=name, type="html")
            else:
                yield Raw(text=text, source=name, type="code" if code else extension or "txt", code=code)
    except Unusable as fault:
        yield Dropped(source=name, reason=str(fault))
    except (OSError, EOFError, zlib.error) as fault:
        yield Dropped(source=name, reason="unreadable" if isinstance(fault, PermissionError) else "damaged or missing")


def _kind(name: str) -> tuple[str, bool]:
    """("page.HTML.gz") -> ("html", True)"""
    parts = name.lower().split(".")[1:]
    packed = parts[-1:] == ["gz"]
    parts = parts[:-1] if packed else parts
    return (parts[-1] if parts else ""), packed


def _read(path: Path, packed: bool, max_bytes: int) -> bytes:
    """At most `max_bytes`, counted after unpacking, so that a small file can't fill the memory."""
    with gzip.open(path) if packed else path.open("rb") as file:
        data: bytes = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise Unusable("too large")
    if not data.strip():
        raise Unusable("empty")
    return data


def _decode(data: bytes) -> str:
    try:
        if data.startswith((b"\xff\xfe", b"\xfe\xff")):
            return data.decode("utf-16")
        if b"\0" in data:
            raise Unusable("binary")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        # Text in an older encoding is mostly ASCII around the fault; anything else is no text.
        near = data[max(0, fault.start - 200) : fault.start + 200]
        printable = sum(32 <= byte < 127 or byte in b"\n\r\t" for byte in near)
        raise Unusable("undecodable" if printable > 0.5 * len(near) else "binary") from None


def _main_text(html: str) -> str:
    from trafilatura import extract

    text = extract(html, include_comments=False)
    if not text:
        raise Unusable("no text in html")
    return str(text)


def _jsonl(path: Path, name: str, packed: bool, max_bytes: int) -> Iterator[Raw | Conversation | Dropped]:
    lines = 0
    with gzip.open(path) if packed else path.open("rb") as file:
        while line := file.readline(max_bytes + 1):
            lines += 1
            where = f"{name}:{lines}"
            try:
                if len(line) > max_bytes:
                    raise Unusable("too large")
                if line.strip():
                    yield _record(json.loads(_decode(line)), where, "jsonl")
            except Unusable as fault:
                yield Dropped(source=where, reason=str(fault))
            except (ValueError, RecursionError):
                yield Dropped(source=where, reason="malformed json")
    if not lines:
        raise Unusable("empty")


def _table(text: str, name: str, extension: str) -> Iterator[Raw | Conversation | Dropped]:
    if extension == "json":
        try:
            data = json.loads(text)
        except (ValueError, RecursionError):
            raise Unusable("malformed json") from None
        for number, record in enumerate(data if isinstance(data, list) else [data], start=1):
            yield _or_dropped(record, f"{name}:{number}", "json")
        return
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.StringIO(text), delimiter="\t" if extension == "tsv" else ",")
    try:
        if not {column.lower().strip() for column in rows.fieldnames or ()} & {*TEXT_FIELDS, "messages"}:
            yield Raw(text=text, source=name, type=extension)  # a table of values is one document, as it stands
            return
        for row in rows:
            record = {str(key).lower().strip(): value for key, value in row.items()}
            yield _or_dropped(record, f"{name}:{rows.line_num}", extension)
    except csv.Error:
        raise Unusable("malformed csv") from None


def _parquet(path: Path, name: str) -> Iterator[Raw | Conversation | Dropped]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [column for column in (*TEXT_FIELDS, "messages") if column in file.schema_arrow.names]
            if not columns:
                raise Unusable("no text field")
            number = 0
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield _or_dropped(record, f"{name}:{number}", "parquet")
    except pyarrow.ArrowException:
        raise Unusable("malformed parquet") from None


def _or_dropped(record: Any, where: str, type: str) -> Raw | Conversation | Dropped:
    try:
        return _record(record, where, type)
    except Unusable as fault:
        return Dropped(source=where, reason=str(fault))


def _record(record: Any, where: str, type: str) -> Raw | Conversation:
    """A JSON object, CSV row or parquet row as what it is."""
    if not isinstance(record, Mapping):
        raise Unusable("no text field")
    if isinstance(record.get("messages"), list):
        messages = []
        for turn in record["messages"]:
            if not (
                isinstance(turn, Mapping)
                and turn.get("role") in get_args(Role)
                and isinstance(turn.get("content"), str)
            ):
                raise Unusable("malformed messages")
            messages.append(Message(role=turn["role"], content=turn["content"]))
        if not any(message.role == "assistant" for message in messages):
            raise Unusable("no assistant turn")
        return Conversation(messages=tuple(messages), meta={"source": where})
    for name in TEXT_FIELDS:
        if isinstance(record.get(name), str) and record[name].strip():
            return Raw(text=record[name], source=where, type=type)
    raise Unusable("no text field")
