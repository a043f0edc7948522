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
        truth = [one.tags for one in test]

        began = time.monotonic()
        linear = Linear(
            [row for one in train for row in word_features(one.words)],
            [tag for one in train for tag in one.tags],
            at_least=2,
        )
        told = [linear.predict(word_features(one.words)) for one in test]
        say(reporter, "TF-IDF + logistic regression", truth, told, time.monotonic() - began)

        began = time.monotonic()
        model = load(run_stage("finetune", recipe, overrides, workspace, reporter).path)
        assert isinstance(model, Model)
        told = [[tag for tag, _ in row] for row in model.headed.tag([one.words for one in test])]
        say(reporter, "fine-tuned", truth, told, time.monotonic() - began)


def say(reporter: Reporter, name: str, truth: list[tuple[str, ...]], told: list[list[str]], seconds: float) -> None:
    value, low, high = interval(entity_counts(truth, told), f1)
    reporter.line(f"{name}: entity F1 {value:.3f} [{low:.3f}, {high:.3f}] on {len(truth)} sentences, {seconds:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
