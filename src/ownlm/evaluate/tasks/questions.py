"""Questions never asked in training, asked through the model's own chat template: greedy, exact match, per skill.

A skill is scored by itself ("people.home") and with its family ("people"), never mixed with another family. The
questions about one person are resampled together. Confidence in an answer is the product of the probabilities of its
tokens, its end included.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ownlm.artifact import Artifact
from ownlm.evaluate import metrics
from ownlm.evaluate.harness import Answer, Result, Settings, Task, complete, draw
from ownlm.generate.model import Model
from ownlm.records import Conversation, Message, Question, Score, read_jsonl
from ownlm.report import Reporter

UNKNOWN = "unknown"  # the right answer to what nobody can know


def questions(documents: Artifact) -> Task | None:
    """The task of answering the questions of a documents artifact, if it has any."""
    if not documents.has("questions.jsonl"):
        return None
    training: dict[str, list[str]] = defaultdict(list)
    if documents.has("conversations.jsonl"):
        for talk in read_jsonl(documents.file("conversations.jsonl"), Conversation):
            replies = [message.content for message in talk.messages if message.role == "assistant"]
            for skill, reply in zip(talk.meta.get("skills", ()), replies, strict=False):
                training[skill].append(reply)
    return ask(list(read_jsonl(documents.file("questions.jsonl"), Question)), training)


def ask(asked: Sequence[Question], training: Mapping[str, Sequence[str]] | None = None) -> Task:
    """The task of answering questions. `training`: the right answers that training showed, per skill, for the baseline."""

    def task(model: Model, settings: Settings, reporter: Reporter) -> Result:
        chosen = draw(asked, settings.limit, settings.seed)
        prompts = [[Message(role="user", content=question.prompt)] for question in chosen]
        completions = complete(model, prompts, settings, reporter, task="questions")
        answered = [
            (
                question,
                Answer(
                    task="questions",
                    skill=question.skill,
                    prompt=question.prompt,
                    expected=question.answer,
                    given=completion.text,
                    ok=metrics.exact_match(completion.text, question.answer),
                    confidence=math.exp(min(0.0, sum(completion.logprobs))),
                ),
            )
            for question, completion in zip(chosen, completions, strict=True)
            if completion is not None
        ]
        scores, details = count(answered, training or {}, settings.seed)
        answers = tuple(answer for _, answer in answered)
        return Result(
            task="questions", scores=scores, answers=answers, details=details, skipped=len(chosen) - len(answers)
        )

    return task


Answered = tuple[Question, Answer]


def count(
    answered: Sequence[Answered], training: Mapping[str, Sequence[str]], seed: int
) -> tuple[tuple[Score, ...], dict[str, Any]]:
    """The scores of answered questions per family and skill, what strangers and known people were told, and calibration."""
    scores: list[Score] = []
    guesses: dict[str, str] = {}
    families: dict[str, dict[str, list[Answered]]] = defaultdict(lambda: defaultdict(list))
    for pair in answered:
        families[pair[1].skill.partition(".")[0]][pair[1].skill].append(pair)
    for family, skills in families.items():
        baselines: dict[str, float | None] = {}
        for skill, pairs in skills.items():
            right = [question.answer for question, _ in pairs]
            guesses[skill], share = metrics.majority(right, training.get(skill))
            # Where every right answer is the same, the guesser that knows the skill knows the answer: no bar at all.
            baselines[skill] = share if len(set(map(metrics.normalise, right))) > 1 else None
        known = [(share, len(skills[skill])) for skill, share in baselines.items() if share is not None]
        together = sum(share * n for share, n in known) / sum(n for _, n in known) if known else None
        everything = [pair for pairs in skills.values() for pair in pairs]
        if len(skills) > 1:
            scores.append(_accuracy(f"questions/{family}", everything, together, seed))
        scores += [_accuracy(f"questions/{skill}", pairs, baselines[skill], seed) for skill, pairs in skills.items()]

    nobody = [pair for pair in answered if metrics.exact_match(pair[0].answer, UNKNOWN)]
    somebody = [pair for pair in answered if not metrics.exact_match(pair[0].answer, UNKNOWN)]
    if nobody:
        scores.append(_share("hallucinated", nobody, [not answer.ok for _, answer in nobody], seed))
    if nobody and somebody:
        refused = [metrics.exact_match(answer.given, UNKNOWN) for _, answer in somebody]
        scores.append(_share("refused", somebody, refused, seed))

    everyone: dict[str, Sequence[Answered]] = {"questions": answered} | {
        f"questions/{family}": [pair for pairs in skills.values() for pair in pairs]
        for family, skills in families.items()
    }
    for task, asked in everyone.items():
        sure, ok = [answer.confidence for _, answer in asked], [answer.ok for _, answer in asked]
        for metric, (value, low, high) in (
            ("calibration error", metrics.calibration_error(sure, ok, seed=seed)),
            ("brier", metrics.brier(sure, ok, seed=seed)),
        ):
            scores.append(Score(task=task, metric=metric, value=value, low=low, high=high, n=len(asked)))
    bins = metrics.reliability([answer.confidence for _, answer in answered], [answer.ok for _, answer in answered])
    source = "training" if any(skill in training for skill in guesses) else "test"
    return tuple(scores), {"baseline_from": source, "guesses": guesses, "reliability": [asdict(bin) for bin in bins]}


def _accuracy(task: str, pairs: Sequence[Answered], baseline: float | None, seed: int) -> Score:
    value, low, high = metrics.proportion([answer.ok for _, answer in pairs], groups=_groups(pairs), seed=seed)
    return Score(task=task, metric="accuracy", value=value, low=low, high=high, n=len(pairs), baseline=baseline)


def _share(metric: str, pairs: Sequence[Answered], true: Sequence[bool], seed: int) -> Score:
    value, low, high = metrics.proportion(true, groups=_groups(pairs), seed=seed)
    return Score(task="questions", metric=metric, value=value, low=low, high=high, n=len(pairs))


def _groups(pairs: Sequence[Answered]) -> list[str]:
    """Who a question is about, or the question itself."""
    return [str(question.meta.get("person", f"question {index}")) for index, (question, _) in enumerate(pairs)]
