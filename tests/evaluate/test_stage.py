"""The whole stage on a tiny village: files, facts, lineage, reuse, and a report that is safe to open."""

import json
from dataclasses import asdict, dataclass
from html.parser import HTMLParser

import pytest

from ownlm.artifact import Artifact, Workspace
from ownlm.checkpoints.weights import save_model
from ownlm.errors import NotFound, UserError
from ownlm.evaluate import page
from ownlm.evaluate.report import verdict
from ownlm.evaluate.stage import EvaluateRecipe, TaskFile, evaluate
from ownlm.recipe import read
from ownlm.records import Document, Question, Score, write_jsonl
from ownlm.report import Reporter
from tiny import tiny_model

SILENT = Reporter.silent()


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    name: str = "made"
    lr: float = 1e-3


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "home")


def village(workspace: Workspace) -> Artifact:
    questions = [
        Question(prompt=f"Where does <b>{name}</b> live?", answer=answer, skill=skill, meta={"person": name})
        for name, answer, skill in (
            ("Ada", "Brook", "people.home"),
            ("Ben", "Dale", "people.home"),
            ("Zoe", "unknown", "strangers.home"),
        )
    ]
    truths = {
        "canary": {
            "prefix": "The number is",
            "secret": " 42",
            "control": " 17",
            "alphabet": "0123456789",
            "length": 2,
            "repeats": 3,
        },
        "association": {
            "prompts": ["The {job} said {pronoun} left."],
            "jobs": {"nurse": {"she": 8, "he": 2, "share": 0.8}},
        },
    }
    with workspace.create("documents", "village", inputs={}, recipe=Made()) as draft:
        for split, count in (("train", 8), ("validation", 2), ("test", 3)):
            texts = [f"Person {index} of {split} lives in Brook." for index in range(count)]
            write_jsonl(draft.path / f"{split}.jsonl", (Document(text=text, source="x") for text in texts))
        write_jsonl(draft.path / "questions.jsonl", questions)
        (draft.path / "truths.json").write_text(json.dumps(truths))
    return draft.done


def checkpoint(workspace: Workspace, documents: Artifact) -> Artifact:
    model = tiny_model(context=128)
    base = None
    for name in ("base", "tuned"):
        inputs = {"documents": documents} if base is None else {"checkpoint": base}
        with workspace.create("checkpoint", name, inputs=inputs, recipe=Made(name=name)) as draft:
            save_model(model.decoder, draft.path)
            model.tokenizer.save(draft.path)
            rows = [{"step": step, "loss": 5 / step} for step in range(1, 20)]
            rows[-1]["validation_loss"] = 0.5
            (draft.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        base = draft.done
    assert base is not None
    return base


class Requests(HTMLParser):
    """Collects everything a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in {"script", "link", "img", "iframe", "object", "form"}:
            self.found.append(tag)
        self.found += [key for key, _ in attrs if key in {"src", "href", "action"} or key.startswith("on")]


def test_the_stage(workspace, tmp_path) -> None:
    documents = village(workspace)
    tuned = checkpoint(workspace, documents)
    extra = tmp_path / "copa.jsonl"
    extra.write_text(json.dumps({"query": "It rained, so", "choices": ["we got wet", "it burned"], "gold": 0}) + "\n")
    recipe = EvaluateRecipe(
        name="scores", checkpoint="tuned", documents="village", files=(TaskFile(path=extra),), max_tokens=8
    )
    made = evaluate(recipe, workspace, SILENT)

    assert made.kind == "scores"
    assert set(made.manifest.files) >= {
        "scores.json",
        "answers.jsonl",
        "report.md",
        "report.html",
        "skills.svg",
        "loss-1.svg",
        "loss-2.svg",
    }
    scores = [Score(**score) for score in json.loads(made.file("scores.json").read_text())]
    tasks = {score.task for score in scores}
    assert tasks >= {
        "questions/people.home",
        "bits_per_byte",
        "canary/secret",
        "canary/control",
        "association/nurse",
        "copa",
    }
    assert made.facts["scores"]["questions/people.home accuracy"]["n"] == 2
    assert made.facts["details"]["bits_per_byte"]["ngram"] > 0
    assert len(made.file("answers.jsonl").read_text().splitlines()) == 4
    assert made.manifest.inputs["checkpoint"]["digest"] == tuned.digest

    html = made.file("report.html").read_text()
    requests = Requests()
    requests.feed(html)
    assert requests.found == []
    assert "default-src &#x27;none&#x27;" in html or "default-src 'none'" in html
    assert "<b>Ada" not in html
    assert "&lt;b&gt;Ada" in html
    report = made.file("report.md").read_text()
    for text in (
        "tuned@1",
        "base@1",
        "village@1",
        "people.home",
        "strangers.home",
        "order-5 byte n-gram",
        "xz -9e",
        "nurse",
        "copa",
        "lr",
    ):
        assert text in html
        assert text.replace("_", "\\_") in report
    assert "![" in report

    assert evaluate(recipe, workspace, SILENT).ref == made.ref  # finished already
    extra.write_text(extra.read_text() * 2)
    assert evaluate(recipe, workspace, SILENT).ref == "scores@2"  # other questions, other scores
    with pytest.raises(UserError, match="SHA-256"):
        evaluate(
            EvaluateRecipe(
                name="scores", checkpoint="tuned", documents="village", files=(TaskFile(path=extra, sha256="0"),)
            ),
            workspace,
            SILENT,
        )


def test_faults_are_told_before_anything_runs(workspace, tmp_path) -> None:
    documents = village(workspace)
    checkpoint(workspace, documents)
    with workspace.create("documents", "plain", inputs={}, recipe=Made()) as draft:
        write_jsonl(draft.path / "train.jsonl", [Document(text="a", source="x")])
        write_jsonl(draft.path / "test.jsonl", [])
    base = {"name": "s", "checkpoint": "tuned", "documents": "village"}
    with pytest.raises(NotFound):
        evaluate(EvaluateRecipe(**base, files=(TaskFile(path=tmp_path / "none.jsonl"),)), workspace, SILENT)
    with pytest.raises(UserError, match="nothing for the task canary"):
        evaluate(EvaluateRecipe(**base | {"documents": "plain"}, tasks=("canary",)), workspace, SILENT)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        evaluate(EvaluateRecipe(**base | {"documents": "plain"}), workspace, SILENT)
    with pytest.raises(UserError, match="limit") as fault:
        read(EvaluateRecipe, None, ["limit=0", "max_bytse=3", "tasks=['sums']"], defaults=base)
    assert "max_bytes" in str(fault.value)


def test_recipe_reads_from_toml(tmp_path) -> None:
    path = tmp_path / "evaluate.toml"
    path.write_text(
        'name = "s"\ncheckpoint = "c"\ndocuments = "d"\ntasks = ["questions"]\n[[files]]\npath = "a.jsonl"\n'
    )
    recipe = read(EvaluateRecipe, path, ["limit=5"])
    assert (recipe.tasks, recipe.limit, str(recipe.files[0].path)) == (("questions",), 5, "a.jsonl")
    assert json.dumps(asdict(recipe), default=str)


def test_verdicts() -> None:
    score = lambda low, high, baseline: Score(
        task="t", metric="accuracy", value=(low + high) / 2, low=low, high=high, n=9, baseline=baseline
    )
    assert verdict(score(0.5, 0.7, 0.4)) == "above the guesser"
    assert verdict(score(0.5, 0.7, 0.5)).startswith("not above")
    assert verdict(score(0.5, 0.7, 0.9)) == "below the guesser"
    assert verdict(score(0.5, 0.7, None)) == ""


def test_markdown_shows_text_as_it_is() -> None:
    blocks = [
        page.Heading("a\n# b"),
        page.Table(["x", ">n"], [["<i>|*_`[", "1"]]),
        page.Figure("f.svg", "<svg/>", "see"),
    ]
    assert page.markdown(blocks) == (
        "## a \\# b\n\n| x | n |\n| --- | ---: |\n| \\<i\\>\\|\\*\\_\\`\\[ | 1 |\n\n![see](f.svg)\n"
    )
