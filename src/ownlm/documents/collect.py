"""The stage `collect`: a folder of files, or a generated world -> clean, de-duplicated documents in three splits; or labelled
examples of a task (examples.py).

    files ─► read ─► normalise ─► rules ─► exact duplicates ─► language ─► split by hash ─► train / validation / test .jsonl
                └─ conversations ────────► exact duplicates ─────────────► conversations(_validation).jsonl
    whatever falls out on the way ─────────────────────────────────────► dropped.jsonl, a line and a reason each

Documents pass one by one; what stays in memory is a hash of each. Long documents stay whole.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TextIO

from ownlm.artifact import Artifact, Draft, Workspace
from ownlm.documents.clean import content_hash, fault_of, language_of, normalise
from ownlm.documents.examples import ExamplesSource, collect_examples
from ownlm.documents.sources import Dropped, Raw, find_files, read_file
from ownlm.documents.split import cut_tail, split_of
from ownlm.errors import NotFound, UserError
from ownlm.records import Conversation, Document, Message, read_jsonl, to_json, write_jsonl
from ownlm.report import Reporter, quantity, size


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """A folder of files, or one file."""

    kind: Literal["folder"] = "folder"
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSource:
    """The generated village. `edition` 2 is the same village later, with some facts changed."""

    kind: Literal["world"] = "world"
    people: int = 128
    edition: Literal[1, 2] = 1
    mentions: int = 60
    story_documents: int = 6000
    sum_documents: int = 4000

    def __post_init__(self) -> None:
        if self.people < 8 or self.people % 4:
            raise ValueError("people must be a multiple of 4, at least 8")
        if self.people * self.mentions < 96:
            raise ValueError(
                "people * mentions must be at least 96, or there are too few documents to plant duplicates in"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentsRecipe:
    """Where documents come from and which of them are kept.

    `min_characters` and `rules` (the quality rules of clean.py) apply to folders; a world is kept as it was made, but for
    exact duplicates. A file or record of more than `max_bytes` is left out.
    """

    name: str
    source: FolderSource | WorldSource | ExamplesSource
    seed: int = 0
    min_characters: int = 50
    max_bytes: int = 64_000_000
    rules: bool = True
    validation_share: float = 0.05
    test_share: float = 0.05
    snapshot: str = ""  # hash of the folder's file names, sizes and times; `collect` fills it in


def collect(recipe: DocumentsRecipe, workspace: Workspace, reporter: Reporter) -> Artifact:
    """A documents artifact. Raises NotFound for a folder that isn't there, UserError for one without usable text."""
    if min(recipe.validation_share, recipe.test_share) < 0 or recipe.validation_share + recipe.test_share >= 0.9:
        raise UserError("validation_share and test_share must leave documents to train on.", cure="Set both near 0.05.")
    if isinstance(recipe.source, FolderSource):
        recipe = replace(recipe, snapshot=_snapshot(Path(recipe.source.path).expanduser()))
    elif isinstance(recipe.source, ExamplesSource):
        recipe = replace(recipe, snapshot=" ".join(map(_snapshot, recipe.source.paths())))
    if found := workspace.find(recipe.name, kind="documents", inputs={}, recipe=recipe, seed=recipe.seed):
        return found
    with workspace.create("documents", recipe.name, inputs={}, recipe=recipe, seed=recipe.seed) as draft:
        if isinstance(recipe.source, WorldSource):
            _collect_world(recipe, recipe.source, draft)
        elif isinstance(recipe.source, ExamplesSource):
            shares = {"validation_share": recipe.validation_share, "test_share": recipe.test_share}
            collect_examples(recipe.source, draft, **shares, max_bytes=recipe.max_bytes)
        else:
            _collect_folder(recipe, Path(recipe.source.path).expanduser(), draft, reporter)
    facts = draft.done.facts
    left_out = "; ".join(f"{count} {reason}" for reason, count in facts["dropped"].items())
    if "examples" in facts:
        said = ", ".join(f"{count:,} {split}" for split, count in facts["examples"].items())
        said = f"Examples of {facts['task']}: {said}"
    else:
        kept = sum(split["documents"] for split in facts["splits"].values())
        said = f"{quantity(kept)} documents ({size(sum(split['bytes'] for split in facts['splits'].values()))}) kept"
    reporter.line(said + (f", left out: {left_out}." if left_out else "."))
    reporter.event("documents", ref=draft.done.ref, **facts)
    return draft.done


class _Writer:
    """Sorts documents into the files of a draft, drops exact duplicates, and counts everything."""

    def __init__(self, recipe: DocumentsRecipe, folder: Path, files: ExitStack) -> None:
        self.recipe, self.folder, self._files = recipe, folder, files
        self._open: dict[str, TextIO] = {}
        self._seen: set[bytes] = set()
        self.splits = {split: Counter(documents=0, bytes=0) for split in ("train", "validation", "test")}
        self.types: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.conversations: Counter[str] = Counter()

    def write(self, name: str, record: Any) -> None:
        if name not in self._open:
            self._open[name] = self._files.enter_context((self.folder / name).open("w", encoding="utf-8"))
        self._open[name].write(json.dumps(record, ensure_ascii=False) + "\n")

    def drop(self, source: str, reason: str) -> None:
        self.dropped[reason] += 1
        self.write("dropped.jsonl", {"source": source, "reason": reason})

    def new(self, text: str, source: str) -> bytes | None:
        """The hash of a text, or None after dropping it because it was there before."""
        digest = content_hash(text)
        if digest in self._seen:
            self.drop(source, "exact duplicate")
            return None
        self._seen.add(digest)
        return digest

    def keep(self, document: Document, digest: bytes, type: str) -> None:
        split = split_of(digest, validation_share=self.recipe.validation_share, test_share=self.recipe.test_share)
        self.splits[split].update(documents=1, bytes=len(document.text.encode()))
        self.types[type] += 1
        self.languages[document.meta.get("code") or document.language] += 1
        self.write(f"{split}.jsonl", to_json(document))

    def keep_conversation(self, conversation: Conversation, digest: bytes) -> None:
        held_out = split_of(digest, validation_share=self.recipe.validation_share, test_share=0) == "validation"
        name = "conversations_validation" if held_out else "conversations"
        self.conversations[name] += 1
        self.write(f"{name}.jsonl", to_json(conversation))

    def facts(self) -> dict[str, Any]:
        return {
            "splits": {split: dict(counts) for split, counts in self.splits.items()},
            "types": dict(self.types.most_common()),
            "languages": dict(self.languages.most_common()),
            "dropped": dict(self.dropped.most_common()),
            "conversations": dict(self.conversations),
        }


def _collect_folder(recipe: DocumentsRecipe, folder: Path, draft: Draft, reporter: Reporter) -> None:
    files = 0
    with ExitStack() as stack:
        writer = _Writer(recipe, draft.path, stack)
        for path, name in _files(folder):
            files += 1
            for found in read_file(path, name, max_bytes=recipe.max_bytes):
                if isinstance(found, Dropped):
                    writer.drop(found.source, found.reason)
                elif isinstance(found, Conversation):
                    _take_conversation(found, writer)
                else:
                    _take(found, writer)
            kept = sum(counts["documents"] for counts in writer.splits.values())
            reporter.status(f"documents: {files} files read, {kept} documents kept, {writer.dropped.total()} left out")
        facts = writer.facts()
    if not writer.types and not writer.conversations:
        if not files:
            raise UserError(
                "there are no files in this folder.",
                where=str(folder),
                cure="Give a folder with txt, md, html, jsonl, parquet, csv or source code.",
            )
        reasons = "; ".join(f"{count} {reason}" for reason, count in writer.dropped.most_common())
        raise UserError(
            f"none of the {files} files holds usable text: {reasons}.",
            where=str(folder),
            cure="Give text, or lower min_characters or set rules=false if these are wanted.",
        )
    draft.facts |= {"files": files, **facts}
    _hold_out(recipe, draft)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "dropped.jsonl"):
        (draft.path / name).touch()


def _take(raw: Raw, writer: _Writer) -> None:
    recipe = writer.recipe
    text = normalise(raw.text)
    short = "too short" if len(text) < recipe.min_characters else None
    if fault := short or (fault_of(text, code=raw.code is not None) if recipe.rules else None):
        writer.drop(raw.source, fault)
    elif digest := writer.new(text, raw.source):
        language = "und" if raw.code else language_of(text)
        meta = {**raw.meta, "type": raw.type, **({"code": raw.code} if raw.code else {})}
        writer.keep(Document(text=text, source=raw.source, language=language, meta=meta), digest, raw.type)


def _take_conversation(found: Conversation, writer: _Writer) -> None:
    messages = tuple(Message(role=message.role, content=normalise(message.content)) for message in found.messages)
    whole = "\n".join(f"{message.role}: {message.content}" for message in messages)
    if digest := writer.new(whole, found.meta["source"]):
        writer.keep_conversation(Conversation(messages=messages, meta=found.meta), digest)


def _collect_world(recipe: DocumentsRecipe, source: WorldSource, draft: Draft) -> None:
    from ownlm.documents.world import World

    if source.people < 8 or source.people % 4:
        raise UserError(
            f"a world of {source.people} people can't be made.", cure="Set people to a multiple of 4, 8 at least."
        )
    world = World.generate(
        recipe.seed,
        people=source.people,
        edition=source.edition,
        mentions=source.mentions,
        story_documents=source.story_documents,
        sum_documents=source.sum_documents,
    )
    with ExitStack() as stack:
        writer = _Writer(recipe, draft.path, stack)
        for document in world.documents:
            if digest := writer.new(document.text, document.source):
                writer.keep(document, digest, "world")
        facts = writer.facts()
    facts["conversations"] = {
        "conversations": write_jsonl(draft.path / "conversations.jsonl", world.conversations),
        "conversations_validation": write_jsonl(
            draft.path / "conversations_validation.jsonl", world.validation_conversations
        ),
    }
    facts["questions"] = write_jsonl(draft.path / "questions.jsonl", world.questions)
    (draft.path / "truths.json").write_text(json.dumps(world.truths, ensure_ascii=False, indent=1), encoding="utf-8")
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "dropped.jsonl"):
        (draft.path / name).touch()
    draft.facts |= facts


def _hold_out(recipe: DocumentsRecipe, draft: Draft) -> None:
    """Give an empty validation or test split the end of the longest training document: a folder with a few files, or a
    single book, must have something held out too. The facts say from where it was cut."""
    splits = draft.facts["splits"]
    shares = {"validation": recipe.validation_share, "test": recipe.test_share}
    for split, share in shares.items():
        path = draft.path / "train.jsonl"
        if not share or splits[split]["documents"] or not splits["train"]["documents"]:
            continue
        longest = max(enumerate(read_jsonl(path, Document)), key=lambda item: len(item[1].text))
        at, document = longest
        head, tail = cut_tail(document.text, share)
        if min(len(head), len(tail)) < recipe.min_characters:
            continue
        held_out = replace(document, text=tail, meta={**document.meta, "part": "end"})
        shortened = draft.path / "shortened.jsonl"
        kept = replace(document, text=head, meta={**document.meta, "part": "beginning"})
        write_jsonl(shortened, (kept if n == at else other for n, other in enumerate(read_jsonl(path, Document))))
        shortened.replace(path)
        write_jsonl(draft.path / f"{split}.jsonl", [held_out])
        splits[split] = {"documents": 1, "bytes": len(tail.encode())}
        splits["train"]["bytes"] += len(head.encode()) - len(document.text.encode())
        draft.facts.setdefault("cut", {})[split] = document.source


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    if folder.is_dir():
        yield from find_files(folder)
    else:
        yield folder, folder.name


def _snapshot(folder: Path) -> str:
    """What the folder looks like now, so that a changed folder is read again."""
    if not folder.exists():
        raise NotFound("there is no such folder.", where=str(folder), cure="Check the path.")
    digest = hashlib.sha256()
    for path, name in islice(_files(folder), 1_000_000):
        try:
            status = path.stat()
            digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogatepass"))
        except OSError:
            digest.update(f"{name}\0gone\n".encode(errors="surrogatepass"))
    return digest.hexdigest()
