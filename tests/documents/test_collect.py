"""A folder with everything in it that people's folders have, good and bad."""

import gzip
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from ownlm.artifact import Artifact, Workspace
from ownlm.documents import collect as stage
from ownlm.documents.clean import content_hash, fault_of, language_of, normalise, well_formed
from ownlm.documents.collect import DocumentsRecipe, FolderSource, WorldSource, collect
from ownlm.documents.split import cut_tail, split_of
from ownlm.errors import NotFound, UserError
from ownlm.records import Conversation, Document, read_jsonl
from ownlm.report import Reporter

WORDS = (
    "river stone early light walked under three houses because winter came slowly over green hills and people".split()
)


def prose(seed: int, words: int = 80) -> str:
    pick = random.Random(seed)
    return "\n".join(" ".join(pick.choices(WORDS, k=8)) + "." for _ in range(words // 8))


def run(folder: Path, tmp_path: Path, **options: Any) -> Artifact:
    recipe = DocumentsRecipe(name="mine", source=FolderSource(path=str(folder)), **options)
    return collect(recipe, Workspace(tmp_path / "home"), Reporter.silent())


def texts(artifact: Artifact) -> dict[str, Document]:
    splits = ("train", "validation", "test")
    return {d.source: d for split in splits for d in read_jsonl(artifact.file(f"{split}.jsonl"), Document)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("\ufeff" + prose(1))
    (root / "b.md.gz").write_bytes(gzip.compress(prose(2).encode()))
    (root / "utf16.txt").write_bytes(prose(3).encode("utf-16"))
    (root / "deep" / "copy.txt").write_text(prose(1).upper().replace("\n", "\r\n"))
    article = "".join(f"<p>{prose(seed)}</p>" for seed in (4, 5))
    (root / "page.html").write_text(f"<html><body><nav>Home About</nav><article>{article}</article></body></html>")
    (root / "code.py").write_text("def area(width: int, height: int) -> int:\n    return width * height\n" * 2)
    (root / "min.js").write_text("var a=1;" * 500)
    talk = {"messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]}
    lines = [
        json.dumps({"text": prose(6)}),
        json.dumps(talk),
        "{broken",
        json.dumps({"x": 1}),
        json.dumps({"content": prose(7) + "\ud800"}),
    ]
    (root / "records.jsonl").write_text("\n".join(lines))
    (root / "rows.csv").write_text(f'id,text\n1,"{prose(8)}"\n2,""\n')
    parquet.write_table(pa.table({"text": [prose(9), prose(10)], "n": [1, 2]}), root / "t.parquet")
    (root / "fake.parquet").write_bytes(b"PAR1 nothing")
    (root / "binary.txt").write_bytes(bytes(range(256)) * 10)
    (root / "latin1.txt").write_bytes(("caf\xe9 au lait " * 30).encode("latin-1"))
    (root / "empty.md").write_text("")
    (root / "short.txt").write_text("Too short.")
    (root / "huge.txt").write_text(prose(11, 4000))
    (root / "bomb.txt.gz").write_bytes(gzip.compress(b"a" * 100_000))
    (root / "torn.txt.gz").write_bytes(gzip.compress(prose(12).encode())[:-20])
    (root / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (root / ".hidden.txt").write_text(prose(13))
    (root / "deep" / "loop").symlink_to(root)
    (root / "nowhere.txt").symlink_to(root / "missing")
    os.mkfifo(root / "pipe.txt")
    return root


def test_everything_good_is_kept_and_everything_bad_is_counted(folder: Path, tmp_path: Path) -> None:
    made = run(folder, tmp_path, max_bytes=20_000)
    kept = texts(made)
    assert set(kept) == {
        "a.txt", "b.md.gz", "utf16.txt", "page.html", "code.py",
        "records.jsonl:1", "records.jsonl:5", "rows.csv:11", "t.parquet:1", "t.parquet:2",
    }  # fmt: skip
    assert kept["a.txt"].text == prose(1)
    assert kept["utf16.txt"].text == prose(3)
    assert kept["records.jsonl:5"].text.endswith("\ufffd")
    assert "Home" not in kept["page.html"].text
    assert kept["code.py"].meta["code"] == "python"
    assert kept["a.txt"].language == "en"
    assert made.facts["dropped"] == {
        "malformed json": 1, "no text field": 2, "malformed parquet": 1, "binary": 1, "undecodable": 1, "empty": 1,
        "too short": 1, "too large": 2, "damaged or missing": 2, "unknown type": 1, "not a regular file": 1,
        "exact duplicate": 1, "long lines": 1,
    }  # fmt: skip
    dropped = [json.loads(line) for line in made.file("dropped.jsonl").read_text().splitlines()]
    assert {"source": "deep/copy.txt", "reason": "exact duplicate"} in dropped
    assert len(dropped) == sum(made.facts["dropped"].values())
    assert sum(made.facts["types"].values()) == len(kept)
    assert made.facts["languages"]["python"] == 1
    talks = [c for name in made.facts["conversations"] for c in read_jsonl(made.file(f"{name}.jsonl"), Conversation)]
    assert [[m.content for m in talk.messages] for talk in talks] == [["Hi?", "Yes."]]


def test_an_unchanged_folder_is_not_read_again_and_a_changed_one_is(folder: Path, tmp_path: Path) -> None:
    first = run(folder, tmp_path)
    assert run(folder, tmp_path).ref == first.ref
    (folder / "more.txt").write_text(prose(20))
    second = run(folder, tmp_path)
    assert second.ref != first.ref
    # What was there before is in the same split as before.
    for split in ("validation", "test"):
        before = {d.source for d in read_jsonl(first.file(f"{split}.jsonl"), Document) if "part" not in d.meta}
        assert before <= {d.source for d in read_jsonl(second.file(f"{split}.jsonl"), Document)}


def test_a_single_book_has_its_end_held_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    book = prose(1, 4000)
    (tmp_path / "in" / "book.txt").write_text(book)
    for path in (tmp_path / "in", tmp_path / "in" / "book.txt"):
        made = run(path, tmp_path / path.name)
        parts = [d.text for s in ("train", "test", "validation") for d in read_jsonl(made.file(f"{s}.jsonl"), Document)]
        assert len(parts) == 3
        assert "\n".join(parts) == book
        assert made.facts["cut"] == {"validation": "book.txt", "test": "book.txt"}
        assert sum(s["bytes"] for s in made.facts["splits"].values()) == len(book) - 2


def test_a_folder_without_usable_text_says_why(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such folder"):
        run(tmp_path / "missing", tmp_path)
    empty = tmp_path / "in"
    empty.mkdir()
    with pytest.raises(UserError, match="no files"):
        run(empty, tmp_path)
    (empty / "x.bin.txt").write_bytes(b"\0\1\2")
    (empty / "y.txt").write_text("tiny")
    with pytest.raises(UserError, match="none of the 2 files holds usable text: 1 binary; 1 too short"):
        run(empty, tmp_path)
    assert not list((tmp_path / "home").rglob("train.jsonl"))


def test_a_file_that_may_not_be_read_is_counted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    assert run(folder, tmp_path).facts["dropped"]["unreadable"] == 1


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/caf\xe9.txt")).write_text(prose(1))
    assert set(texts(run(tmp_path / "in", tmp_path))) == {"caf\ufffd.txt"}


def test_a_world_comes_with_its_conversations_questions_and_truths(tmp_path: Path) -> None:
    source = WorldSource(people=16, mentions=20, story_documents=200, sum_documents=200)
    recipe = DocumentsRecipe(name="village", source=source, seed=7)
    made = collect(recipe, Workspace(tmp_path), Reporter.silent())
    assert made.facts["questions"] == len(made.file("questions.jsonl").read_text().splitlines()) > 0
    assert made.facts["conversations"]["conversations_validation"] > 0
    assert json.loads(made.file("truths.json").read_text())["seed"] == 7
    assert made.facts["dropped"]["exact duplicate"] > 0
    assert made.facts["splits"]["train"]["documents"] > made.facts["splits"]["validation"]["documents"] > 0


def test_normalise() -> None:
    assert normalise("\n\ufeffe\u0301\x00 \t\r\nb\x1b\r") == "é\nb"
    assert well_formed("a\ud83d\ude00\udc00") == "a😀\ufffd"
    assert content_hash("A  b\nC") == content_hash("a b c") != content_hash("a bc")


def test_rules() -> None:
    assert fault_of(prose(1), code=False) is None
    assert fault_of("same line again and again here\n" * 20, code=False) == "repeated lines"
    assert fault_of("12 34 56 78 90\n" * 20, code=False) == "few letters"
    assert fault_of("\n".join(f"- an item of {word}" for word in prose(2).split()), code=False) == "bullet list"
    assert fault_of("x = 1\n" * 9, code=True) is None
    assert fault_of("x" * 1001, code=True) == "long lines"
    assert fault_of("(((((((((\n" * 9, code=True) == "few letters"


def test_language() -> None:
    assert language_of("Der Fluss war im Winter zugefroren, und die Leute gingen langsam nach Hause.") == "de"
    assert language_of("12 + 34 = 46") == "und"


def test_split_shares() -> None:
    found = [split_of(content_hash(str(n)), validation_share=0.1, test_share=0.2) for n in range(4000)]
    assert found.count("validation") == pytest.approx(400, abs=80)
    assert found.count("test") == pytest.approx(800, abs=110)
    assert cut_tail("one two three four", 0.3) == ("one two", " three four")
    assert cut_tail("x" * 50, 0.1) == ("x" * 50, "")


def test_shares_that_leave_nothing_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must leave documents"):
        run(folder, tmp_path, validation_share=0.5, test_share=0.5)
    assert stage.DocumentsRecipe.__dataclass_params__.frozen  # type: ignore[attr-defined]
