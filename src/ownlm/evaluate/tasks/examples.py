"""Labelled examples held out from training: what the head says, beside TF-IDF and logistic regression learned from the same ones."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ownlm.artifact import Artifact
from ownlm.errors import UserError
from ownlm.evaluate import task_metrics as metrics
from ownlm.evaluate.harness import Result, Settings, Task, draw
from ownlm.evaluate.linear import Linear, text_features, word_features
from ownlm.generate.model import Model
from ownlm.generate.reading import Found
from ownlm.records import EXAMPLES, Score, read_jsonl
from ownlm.report import Reporter

PENALTIES = (1.0, 0.1, 0.01)  # of the baseline; the best on validation examples is taken


def examples(documents: Artifact) -> Task | None:
    """The task of the test examples of a documents artifact; of its validation examples where it has no test."""
    kind = documents.facts.get("task")
    if kind not in ("classification", "tokens", "answer"):
        return None
    files = {name: documents.file(f"examples{name}.jsonl") for name in ("", "_validation", "_test")}
    parts = {name: list(read_jsonl(file, EXAMPLES[kind])) for name, file in files.items()}
    split = "_test" if parts["_test"] else "_validation"
    if not parts[split]:
        return None

    def task(model: Model, settings: Settings, reporter: Reporter) -> Result:
        asked = draw(parts[split], settings.limit, settings.seed)
        reporter.status(f"examples: {len(asked)} of {kind}")
        told = _told(kind, model, asked)
        baseline = None
        if kind != "answer":
            judge = parts["_validation"] if split == "_test" and parts["_validation"] else parts[""]
            models = [_linear(kind, parts[""], penalty) for penalty in PENALTIES]
            best = max(models, key=lambda one: _scores(kind, judge, _predict(kind, one, judge), 0)[0][1][0])
            baseline = [value for _, (value, _, _) in _scores(kind, asked, _predict(kind, best, asked), 0)]
        scores = [
            Score(
                task="examples", metric=name, value=value, low=low, high=high, n=len(asked),
                baseline=None if baseline is None else baseline[at],
            )
            for at, (name, (value, low, high)) in enumerate(_scores(kind, asked, told, settings.seed))
        ]  # fmt: skip
        return Result(task="examples", scores=tuple(scores), details={"kind": kind, "split": split.strip("_")})

    return task


def _told(kind: str, model: Model, asked: Sequence[Any]) -> list[Any]:
    if kind == "tokens":
        return [[tag for tag, _ in row] for row in model.headed.tag([one.words for one in asked])]
    if kind == "classification":
        pairs = [one.pair or "" for one in asked] if asked[0].pair is not None else None
        return [next(iter(row)) for row in model.classify([one.text for one in asked], pairs)]
    answers = [model.answer(one.question, one.context) for one in asked]
    if not all(isinstance(one, Found) for one in answers):
        raise UserError("this model has no span head.", where="examples", cure="Tune it with task = answer.")
    return [one.text for one in answers]


def _scores(
    kind: str, asked: Sequence[Any], told: Sequence[Any], seed: int
) -> list[tuple[str, tuple[float, float, float]]]:
    """(metric, (value, low, high)), the one that counts first."""
    if kind == "tokens":
        truth = [one.tags for one in asked]
        found = [("accuracy of words", metrics.interval(metrics.word_counts(truth, told), metrics.mean, seed=seed))]
        named = any(tag.startswith("B-") for tags in truth for tag in tags)
        f1 = ("entity F1", metrics.interval(metrics.entity_counts(truth, told), metrics.f1, seed=seed))
        return [f1, *found] if named else found
    if kind == "classification":
        labels = [one.label for one in asked]
        right = np.array([[a == b, 1] for a, b in zip(labels, told, strict=True)], float)
        counts = metrics.class_counts(labels, told)
        return [
            ("accuracy", metrics.interval(right, metrics.mean, seed=seed)),
            ("macro F1", metrics.interval(counts, metrics.macro_f1, seed=seed)),
        ]
    pairs = np.array([metrics.span_scores(text, one.answers) for text, one in zip(told, asked, strict=True)])
    ones = np.ones(len(pairs))
    return [
        (name, metrics.interval(np.stack([pairs[:, at], ones], 1), metrics.mean, seed=seed))
        for at, name in enumerate(("exact match", "token F1"))
    ]


def _linear(kind: str, train: Sequence[Any], penalty: float) -> Linear:
    if kind == "tokens":
        rows = [row for one in train for row in word_features(one.words)]
        return Linear(rows, [tag for one in train for tag in one.tags], penalty=penalty, at_least=2)
    return Linear([text_features(one.text, one.pair) for one in train], [one.label for one in train], penalty=penalty)


def _predict(kind: str, model: Linear, asked: Sequence[Any]) -> list[Any]:
    if kind == "tokens":
        return [model.predict(word_features(one.words)) for one in asked]
    return model.predict([text_features(one.text, one.pair) for one in asked])
