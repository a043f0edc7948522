"""The summarisation and translation recipes from a folder of text to scores, with a T5 of a few steps and few examples."""

import json
from pathlib import Path

import pytest

from ownlm.artifact import Workspace
from ownlm.documents.collect import DocumentsRecipe, collect
from ownlm.documents.examples import ExamplesSource
from ownlm.errors import UserError
from ownlm.evaluate.stage import EvaluateRecipe, evaluate
from ownlm.evaluate.task_metrics import chrf, chrf_counts, rouge_l
from ownlm.evaluate.tasks.examples import beginning
from ownlm.generate.opening import load
from ownlm.generate.seq2seq import Seq2Seq
from ownlm.pipeline import read_recipe, recipe_path, run_all
from ownlm.report import Reporter

QUIET = Reporter.silent()
WORDS = "the mill stands by the river and nobody knows who built it in the old days of king Olaf".split()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a T5 that has seen three batches."""
    root = tmp_path_factory.mktemp("t5")
    (root / "texts").mkdir()
    for number in range(40):
        text = "\n".join(" ".join(WORDS[(number + k) % 7 :]) + f" {number * k}" for k in range(40))
        (root / "texts" / f"{number}.txt").write_text(text)
    few = [
        f"documents.source.path={root / 'texts'}",
        "pretrain.steps=3",
        "tokenizer.vocab_size=500",
        "documents.rules=false",
    ]
    workspace = Workspace(root / "home")
    run_all(read_recipe(recipe_path("t5-cpu"), few), workspace, QUIET)
    return workspace


def files(recipe: str, folder: Path) -> list[str]:
    """Data in the shape of the recipe's own: abstracts of several sentences with several summaries; two files line by line."""
    lines = [f"{' '.join(WORDS[n % 9 :])} {n}" for n in range(60)]
    if recipe == "summaries-t5":
        for name in ("dev", "test"):
            rows = [{"source": [line, f"{name} more."], "target": [line[:20], "another"]} for line in lines]
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return [f"documents.source.train={folder / 'dev.jsonl'}", f"documents.source.test={folder / 'test.jsonl'}"]
    (folder / "a.txt").write_text("\n".join(lines))
    (folder / "b.txt").write_text("\n".join(line.upper() for line in lines))
    return [f"documents.source.train={folder / 'a.txt'}", f"documents.source.targets={folder / 'b.txt'}"]


@pytest.mark.parametrize("recipe", ["summaries-t5", "english-german-t5"])
def test_a_recipe_from_examples_to_scores(recipe: str, workspace: Workspace, tmp_path: Path) -> None:
    changes = [*files(recipe, tmp_path), "finetune.steps=3", "evaluate.limit=5", "evaluate.max_tokens=12"]
    whole = read_recipe(recipe_path(recipe), changes)
    made = run_all(whole, workspace, QUIET)["evaluate"]
    assert whole.finetune is not None
    answers = [json.loads(line) for line in made.file("answers.jsonl").read_text().splitlines()]
    given, right = [one["given"] for one in answers], [one["expected"] for one in answers]
    scores = {row["metric"]: row for row in json.loads(made.file("scores.json").read_text())}

    assert scores["chrF"]["n"] == len(answers) == 5
    assert scores["chrF"]["value"] == pytest.approx(chrf(sum(map(chrf_counts, given, right))))
    assert scores["ROUGE-L"]["value"] == pytest.approx(sum(map(rouge_l, given, right)) / 5)
    # A copy of the source says more than a T5 of three steps, and the report shows both.
    assert scores["ROUGE-L"]["baseline"] > scores["ROUGE-L"]["value"]
    assert answers[0]["expected"][:12] in made.file("report.md").read_text().replace("\\", "")
    # What was scored is what the model writes when it is asked with its prefix.
    model = load(whole.finetune.name, workspace=workspace)
    assert isinstance(model, Seq2Seq)
    written = model.generate(whole.finetune.prefix + answers[0]["prompt"], max_tokens=12)
    assert written.text.strip() == given[0]


def test_an_encoder_decoder_is_asked_examples_only(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an encoder-decoder can't be asked bits_per_byte"):
        evaluate(EvaluateRecipe(name="s", checkpoint="small-t5", documents="small-t5-documents"), workspace, QUIET)
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(f"w{n},{n % 2}" for n in range(40)))
    source = ExamplesSource(task="classification", train=str(tmp_path / "t.csv"))
    collect(DocumentsRecipe(name="labels", source=source, validation_share=0.5), workspace, QUIET)
    with pytest.raises(UserError, match="no head for classification"):
        evaluate(EvaluateRecipe(name="s", checkpoint="small-t5", documents="labels"), workspace, QUIET)


def test_the_beginning_of_a_text() -> None:
    assert beginning("one two three four", 0.5) == "one two"
    assert beginning("one two", 0.01) == "one"
    assert beginning("one two", 1.3) == "one two"
