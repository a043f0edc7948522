"""The head that a config.json describes: its class names the task, id2label the labels."""

from collections.abc import Mapping
from typing import Any, cast

from ownlm.errors import UserError
from ownlm.models.families.fields import Fields
from ownlm.models.specs import Head, Problem, Task

TASKS: dict[str, Task | None] = {
    "MaskedLM": "masked_lm", "PreTraining": "masked_lm", "SequenceClassification": "sequence",
    "TokenClassification": "token", "QuestionAnswering": "span", "NextSentencePrediction": None,
}  # fmt: skip
PROBLEMS: dict[str, Problem] = {
    "single_label_classification": "single", "multi_label_classification": "multi", "regression": "regression",
}  # fmt: skip
LABELS = 2**20  # no checkpoint comes near this
TOLD = ("num_labels", "id2label", "label2id", "problem_type")  # the fields of a head


def class_of(hf: Mapping[str, Any]) -> str:
    """The class that a config names first; nothing where none is named."""
    names = hf.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def kind_of(hf: Mapping[str, Any]) -> str:
    """What follows "For" in that class; nothing for a bare model."""
    return class_of(hf).partition("For")[2]


def task_head(fields: Fields, task: Task | None, **spec: Any) -> Head | None:
    """The head of a task that has labels, or a span's; None for others."""
    if task == "span":
        if (count := len(labels(fields))) != 2:
            fields.faults.append(f"a head for question answering has 2 outputs, not {count}")
        return Head(task=task)
    if task not in ("sequence", "token"):
        return None
    names = labels(fields)
    # Where nothing is said, one label means a number.
    default = "regression" if len(names) == 1 else "single_label_classification"
    problem = fields.choice("problem_type", PROBLEMS, default) if task == "sequence" else "single"
    return Head(task=task, labels=names, problem=problem, **spec)


def labels(fields: Fields) -> tuple[str, ...]:
    """The names of the classes in order: `id2label`, or LABEL_0 … of `num_labels`, which is 2 where nothing is said."""
    value = fields.get("id2label")
    if value is None:
        return tuple(f"LABEL_{index}" for index in range(fields.count("num_labels", 2, at_most=LABELS)))
    names = value if isinstance(value, Mapping) else {}
    found = tuple(names.get(str(index), names.get(index)) for index in range(len(names)))
    if not 0 < len(found) <= LABELS or not all(isinstance(name, str) for name in found):
        fields.faults.append(f"id2label must name each class from 0 on, got {str(value)[:200]}")
        return ("LABEL_0",)
    return cast(tuple[str, ...], found)


def headed(
    hf: Mapping[str, Any], architecture: str, task: Task | None, names: tuple[str, ...], problem: Problem
) -> dict[str, Any]:
    """The same config.json for a model with another head; `architecture` is a class of the family. UserError for labels
    that don't fit the task."""
    if (task in ("sequence", "token")) != bool(names):
        raise UserError(f"the task {task} takes {'no ' if names else ''}labels.", where="labels")
    if len(set(names)) != len(names):
        raise UserError("two labels have the same name.", where="labels")
    if problem != "single" and task != "sequence":
        raise UserError(f"the task {task} has one label for each answer.", where="problem")
    stem = architecture.partition("For")[0].removesuffix("LMHeadModel")
    kind = next((f"For{kind}" for kind, known in TASKS.items() if known == task), "Model") if task else "Model"
    new: dict[str, Any] = {key: value for key, value in hf.items() if key not in TOLD} | {
        "architectures": [stem + kind]
    }
    if names:
        new["id2label"] = {str(index): name for index, name in enumerate(names)}
        new["label2id"] = {name: index for index, name in enumerate(names)}
    if task == "sequence":
        new["problem_type"] = next(theirs for theirs, ours in PROBLEMS.items() if ours == problem)
    return new
