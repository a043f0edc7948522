"""A fine-tuned encoder beside TF-IDF and logistic regression, on the same published split: names in text (WNUT 2017).

python benchmarks/finetune_tasks.py CHECKPOINT DATA      DATA: the folder of wnut17_ner; CHECKPOINT: e.g. all-MiniLM-L6-v2
"""

import sys
import tempfile
import time
from pathlib import Path

from ownlm.artifact import Workspace
from ownlm.evaluate.linear import Linear, word_features
from ownlm.evaluate.task_metrics import entity_counts, f1, interval
from ownlm.generate.model import Model, load
from ownlm.pipeline import recipe_path, run_stage
from ownlm.records import Tagged, read_jsonl
from ownlm.report import Reporter

PENALTIES = (1.0, 0.1, 0.03, 0.01, 0.001)


def main(checkpoint: str, data: str) -> None:
    folder = Path(data)
    overrides = [
        f"finetune.checkpoint={checkpoint}",
        f"documents.source.train={folder / 'wnut17train.conll.gz'}",
        f"documents.source.validation={folder / 'emerging.dev.conll.gz'}",
        f"documents.source.test={folder / 'emerging.test.annotated'}",
    ]
    with tempfile.TemporaryDirectory() as home:
        workspace, reporter = Workspace(Path(home)), Reporter()
        recipe = recipe_path("names-ner")
        documents = run_stage("documents", recipe, overrides, workspace, reporter)
        train = list(read_jsonl(documents.file("examples.jsonl"), Tagged))
        test = list(read_jsonl(documents.file("examples_test.jsonl"), Tagged))

        began = time.monotonic()
        judge = list(read_jsonl(documents.file("examples_validation.jsonl"), Tagged))
        models = [linear(train, penalty) for penalty in PENALTIES]
        best = max(
            models, key=lambda one: score(judge, told_by(one, judge))[0]
        )  # its penalty is chosen on held-out sentences
        say(reporter, "TF-IDF + logistic regression", test, told_by(best, test), time.monotonic() - began)

        began = time.monotonic()
        model = load(run_stage("finetune", recipe, overrides, workspace, reporter).path)
        assert isinstance(model, Model)
        told = [[tag for tag, _ in row] for row in model.headed.tag([one.words for one in test])]
        say(reporter, "fine-tuned", test, told, time.monotonic() - began)


def linear(train: list[Tagged], penalty: float) -> Linear:
    """The baseline, trained on every word."""
    rows = [row for one in train for row in word_features(one.words)]
    return Linear(rows, [tag for one in train for tag in one.tags], at_least=2, penalty=penalty)


def told_by(model: Linear, sentences: list[Tagged]) -> list[list[str]]:
    return [model.predict(word_features(one.words)) for one in sentences]


def score(sentences: list[Tagged], told: list[list[str]]) -> tuple[float, float, float]:
    return interval(entity_counts([one.tags for one in sentences], told), f1)


def say(reporter: Reporter, name: str, sentences: list[Tagged], told: list[list[str]], seconds: float) -> None:
    value, low, high = score(sentences, told)
    reporter.line(
        f"{name}: entity F1 {value:.3f} [{low:.3f}, {high:.3f}] on {len(sentences)} sentences, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
