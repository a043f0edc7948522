"""Labelled examples of a task: files of the usual formats -> `examples.jsonl` and its held-out parts.

    classification   csv, tsv, jsonl with a text (and a second one) and a label;
                     or a folder, in which the name of a sub-folder or file is the label: pos/1.txt, de.txt, law.csv
    tokens           a word and its tag on each line, sentences between empty lines (CoNLL); conllu
    answer           jsonl with question, context, answers (and start)
    seq2seq          csv, tsv, jsonl with source and target; or two text files whose lines belong together

Any of them with .gz. `fields` says what the file calls them. What can't be used is counted and written down with its reason.
"""

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ownlm.artifact import Draft
from ownlm.documents.clean import well_formed
from ownlm.documents.sources import find_files
from ownlm.documents.split import split_of
from ownlm.errors import NotFound, UserError
from ownlm.records import Asked, Example, ExampleTask, Labelled, Rewritten, Tagged, write_jsonl

FIELDS: dict[ExampleTask, tuple[str, ...]] = {
    "classification": ("text", "pair", "label"),
    "tokens": ("words", "tags"),
    "answer": ("question", "context", "answers", "start"),
    "seq2seq": ("source", "target"),
}
FILES = {"train": "examples", "validation": "examples_validation", "test": "examples_test"}
CONLLU_WORD, CONLLU_TAG, CONLLU_COLUMNS = 1, 3, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ExamplesSource:
    """Examples of one task. Where `validation` or `test` is not given, the hash of a text decides what is held out.

    targets   the other file, where the lines of `train` and of this one are sources and targets
    fields    the names in the file, e.g. { text = "review", label = "stars" }
    limit     of the examples of each part, at most so many are kept: a random choice that depends on them alone
    """

    kind: Literal["examples"] = "examples"
    task: ExampleTask
    train: str
    validation: str | None = None
    test: str | None = None
    targets: str | None = None
    fields: dict[str, str] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self) -> None:
        if unknown := set(self.fields) - set(FIELDS[self.task]):
            raise ValueError(
                f"fields of {self.task} are {', '.join(FIELDS[self.task])}, not {', '.join(sorted(unknown))}"
            )
        if self.targets is not None and self.task != "seq2seq":
            raise ValueError("targets belongs to seq2seq")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit starts at 1")

    def paths(self) -> list[Path]:
        """All files and folders that it names."""
        named = (self.train, self.validation, self.test, self.targets)
        return [Path(one).expanduser() for one in named if one is not None]


class Wrong(Exception):
    """A row that can't be used; the message is the reason that is counted."""


def collect_examples(
    source: ExamplesSource, draft: Draft, *, validation_share: float, test_share: float, max_bytes: int
) -> None:
    """Write the examples of a source into a draft. Raises UserError when none can be used."""
    dropped: Counter[str] = Counter()
    parts: dict[str, list[tuple[bytes, Example]]] = {split: [] for split in FILES}
    given = {"train": source.train, "validation": source.validation, "test": source.test}
    seen: set[bytes] = set()
    held_out: set[bytes] = set()
    with (draft.path / "dropped.jsonl").open("w", encoding="utf-8") as log:
        for split, path in reversed(given.items()):
            for where, found in () if path is None else read_examples(Path(path).expanduser(), source, max_bytes):
                reason = found if isinstance(found, str) else None
                if not isinstance(found, str):
                    digest = _digest(found)
                    part = split if split != "train" else _split(source, digest, validation_share, test_share)
                    # A held-out file is taken as its publisher made it; training must not know any of it.
                    if split == "train" and (digest in held_out or digest in seen):
                        reason = "held out" if digest in held_out else "exact duplicate"
                    else:
                        parts[part].append((digest, found))
                        (seen if split == "train" else held_out).add(digest)
                if reason is not None:
                    dropped[reason] += 1
                    log.write(json.dumps({"source": where, "reason": reason}, ensure_ascii=False) + "\n")
    if not parts["train"]:
        reasons = "; ".join(f"{count} {reason}" for reason, count in dropped.most_common(5)) or "the file is empty"
        raise UserError(
            f"there is no usable example: {reasons}.", where=source.train, cure="Name what the file has in fields."
        )
    counts = {}
    for split, name in FILES.items():
        chosen = set(sorted({digest for digest, _ in parts[split]})[: source.limit])
        kept = (one for digest, one in parts[split] if digest in chosen)
        counts[split] = write_jsonl(draft.path / f"{name}.jsonl", kept)
    splits = {split: {"documents": 0, "bytes": 0} for split in FILES}
    draft.facts |= {"task": source.task, "examples": counts, "splits": splits, "dropped": dict(dropped.most_common())}


def read_examples(path: Path, source: ExamplesSource, max_bytes: int) -> Iterator[tuple[str, Example | str]]:
    """(where, example, or the reason why it is none) of each row of a file or folder."""
    if not path.exists():
        raise NotFound("there is no such file.", where=str(path), cure="Check the path.")
    if not path.is_dir():
        yield from _file(path, source, max_bytes, None)
        return
    if source.task != "classification":
        raise UserError(f"this is a folder; {source.task} reads a file.", where=str(path))
    for file, name in find_files(path):
        folders, _, stem = name.rpartition("/")
        yield from _file(file, source, max_bytes, folders.partition("/")[0] or stem.split(".")[0], whole=bool(folders))


def _file(
    path: Path, source: ExamplesSource, max_bytes: int, label: str | None, *, whole: bool = False
) -> Iterator[tuple[str, Example | str]]:
    text = _text(path, max_bytes)
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if source.task == "tokens" and kind not in ("jsonl", "ndjson"):
        yield from _conll(text, path.name)
        return
    rows: Iterator[tuple[int, Any]]
    if source.targets is not None and path == Path(source.train).expanduser():
        other = _text(Path(source.targets).expanduser(), max_bytes).splitlines()
        mine = text.splitlines()
        if len(mine) != len(other):
            raise UserError(
                f"{len(mine)} lines, and {len(other)} in {source.targets}: they don't belong together.", where=str(path)
            )
        rows = enumerate(({"source": a, "target": b} for a, b in zip(mine, other, strict=True)), start=1)
    elif kind in ("csv", "tsv"):
        rows = _table(text, path, "\t" if kind == "tsv" else ",")
    elif kind in ("jsonl", "ndjson"):
        rows = enumerate(map(_json, filter(str.strip, text.splitlines())), start=1)
    elif label is not None:
        rows = enumerate(({"text": part} for part in ([text] if whole else text.splitlines())), start=1)
    else:
        raise UserError(
            f"files of this kind hold no examples of {source.task}.", where=str(path), cure="Give csv, tsv or jsonl."
        )
    names = {key: source.fields.get(key, key) for key in FIELDS[source.task]}
    for number, row in rows:
        try:
            if not isinstance(row, Mapping):
                raise Wrong("malformed json")
            values = {key: row.get(name) for key, name in names.items()}
            if label is not None and values["label"] is None:
                values["label"] = label
            yield f"{path.name}:{number}", _example(source.task, values)
        except Wrong as fault:
            yield f"{path.name}:{number}", str(fault)


def _example(task: ExampleTask, row: Mapping[str, Any]) -> Example:
    if task == "classification":
        pair = None if row["pair"] in (None, "") else _string(row, "pair")
        return Labelled(text=_string(row, "text"), pair=pair, label=_string(row, "label"))
    if task == "seq2seq":
        return Rewritten(source=_string(row, "source"), target=_string(row, "target"))
    if task == "tokens":
        words, tags = row["words"], row["tags"]
        if not (isinstance(words, list) and isinstance(tags, list) and len(words) == len(tags) > 0):
            raise Wrong("words and tags are not lists of one length")
        return Tagged(words=tuple(map(str, words)), tags=tuple(map(str, tags)))
    answers = [row["answers"]] if isinstance(row["answers"], str) else row["answers"]
    if isinstance(answers, Mapping):  # as SQuAD has them
        row = {**row, "start": (answers.get("answer_start") or [None])[0]}
        answers = answers.get("text")
    if not isinstance(answers, list) or not answers or not all(isinstance(one, str) and one for one in answers):
        raise Wrong("no answers")
    context = _string(row, "context", strip=False)
    start = row["start"] if isinstance(row["start"], int) else context.find(answers[0])
    if start < 0 or context[start : start + len(answers[0])] != answers[0]:
        raise Wrong("the answer is not in the context")
    return Asked(question=_string(row, "question"), context=context, answers=tuple(answers), start=start)


def _string(row: Mapping[str, Any], key: str, *, strip: bool = True) -> str:
    value = row[key]
    if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
        value = " ".join(value) if key == "source" else value[0]  # sentences of a source; one of several targets
    if isinstance(value, bool | int | float) and key == "label":
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise Wrong(f"no {key}")
    return well_formed(value.strip() if strip else value)


def _conll(text: str, name: str) -> Iterator[tuple[str, Example | str]]:
    """Sentences of `word ... tag` lines; of conllu the universal part of speech, without words that stand for others."""
    words: list[str] = []
    tags: list[str] = []
    fault = ""
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        columns = line.strip().split("\t") if "\t" in line.strip() else line.split()
        if not columns or columns[0] == "-DOCSTART-":
            if words or fault:
                yield f"{name}:{start}", fault or Tagged(words=tuple(words), tags=tuple(tags))
            words, tags, fault, start = [], [], "", number + 1
        elif line.startswith("# ") or (len(columns) == CONLLU_COLUMNS and not columns[0].isdigit()):
            continue
        elif len(columns) == CONLLU_COLUMNS:
            words.append(well_formed(columns[CONLLU_WORD]))
            tags.append(columns[CONLLU_TAG])
        elif len(columns) < 2:
            fault = "a word without a tag"
        else:
            words.append(well_formed(columns[0]))
            tags.append(columns[-1])


def _table(text: str, path: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(io.StringIO(text), delimiter=delimiter)
    try:
        for row in rows:
            yield rows.line_num, row
    except csv.Error as fault:
        raise UserError(f"malformed: {fault}.", where=f"{path}:{rows.line_num}") from None


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _text(path: Path, max_bytes: int) -> str:
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            data: bytes = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise UserError(
                f"this is larger than {max_bytes:,} bytes.", where=str(path), cure="Raise documents.max_bytes."
            )
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as fault:
        raise UserError(f"this can't be read: {fault}.", where=str(path)) from None
    except UnicodeDecodeError:
        raise UserError("this is not UTF-8.", where=str(path), cure="Convert it: iconv -f … -t utf-8.") from None


def _digest(example: Example) -> bytes:
    """A hash of what is given, not of what is asked for: a text with two labels lies on one side of the split."""
    given: Sequence[str]
    if isinstance(example, Labelled):
        given = (example.text, example.pair or "")
    elif isinstance(example, Tagged):
        given = example.words
    elif isinstance(example, Asked):
        given = (example.question, example.context)
    else:
        given = (example.source,)
    return hashlib.sha256("\0".join(given).encode()).digest()


def _split(source: ExamplesSource, digest: bytes, validation_share: float, test_share: float) -> str:
    """Where an example of the training file goes: a part with a file of its own takes none."""
    return split_of(
        digest,
        validation_share=0.0 if source.validation else validation_share,
        test_share=0.0 if source.test else test_share,
    )
