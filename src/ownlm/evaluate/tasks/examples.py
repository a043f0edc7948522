"""Labelled examples held out from training: what the model says of them, beside what the training examples alone teach.

                 scores                                     the baseline: the best on validation examples of
classification   accuracy, macro F1                         TF-IDF and logistic regression, at three penalties
tokens           entity F1, accuracy of words               the same, of each word and its neighbours
answer           exact match, token F1                      the most common answer
seq2seq          chrF, ROUGE-L                              the most common target; the beginning of the source
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from ownlm.artifact import Artifact
from ownlm.errors import UserError
from ownlm.evaluate import task_metrics as metrics
from ownlm.evaluate.harness import Answer, Result, Settings, Task, draw
from ownlm.evaluate.linear import Linear, text_features, word_features
from ownlm.evaluate.metrics import exact_match
from ownlm.generate.model import Model
from ownlm.generate.reading import Found
from ownlm.generate.sampling import Sampling
from ownlm.generate.seq2seq import Seq2Seq
from ownlm.records import EXAMPLES, Score, read_jsonl
from ownlm.report import Reporter
from ownlm.tokens.tasks import source_ids

PENALTIES = (1.0, 0.1, 0.01)
Said = tuple[Any, float]  # a label, tags or a text, and the probability that the model gave it
Guesser = Callable[[Sequence[Any]], list[Any]]


def examples(documents: Artifact) -> Task | None:
    """The task of the test examples of a documents artifact; of its validation examples where it has no test."""
    kind = documents.facts.get("task")
    if kind not in EXAMPLES:
        return None
    files = {name: documents.file(f"examples{name}.jsonl") for name in ("", "_validation", "_test")}
    parts = {name: list(read_jsonl(file, EXAMPLES[kind])) for name, file in files.items()}
    split = "_test" if parts["_test"] else "_validation"
    if not parts[split]:
        return None

    def task(model: Model | Seq2Seq, settings: Settings, reporter: Reporter) -> Result:
        asked = draw(parts[split], settings.limit, settings.seed)
        reporter.status(f"examples: {len(asked)} of {kind}")
        said = _said(kind, model, asked, settings)
        judge = parts["_validation"] if split == "_test" and parts["_validation"] else parts[""]
        guess = max(_guessers(kind, parts[""]), key=lambda one: _scores(kind, judge, one(judge), 0)[0][1][0])
        guessed = [value for _, (value, _, _) in _scores(kind, asked, guess(asked), 0)]
        found = _scores(kind, asked, [one for one, _ in said], settings.seed)
        scores = [
            Score(task="examples", metric=name, value=value, low=low, high=high, n=len(asked), baseline=baseline)
            for (name, (value, low, high)), baseline in zip(found, guessed, strict=True)
        ]
        answers = [_answer(kind, one, *given) for one, given in zip(asked, said, strict=True)]
        details = {"kind": kind, "split": split.strip("_")}
        return Result(task="examples", scores=tuple(scores), answers=tuple(answers), details=details)

    return task


def _said(kind: str, model: Model | Seq2Seq, asked: Sequence[Any], settings: Settings) -> list[Said]:
    if kind == "seq2seq":
        return _written(model, asked, settings)
    if not isinstance(model, Model):
        raise UserError(
            f"an encoder-decoder has no head for {kind}.", where="examples", cure="Tune a decoder or encoder."
        )
    if kind == "tokens":
        rows = model.headed.tag([one.words for one in asked])
        return [([tag for tag, _ in row], min((sure for _, sure in row), default=1.0)) for row in rows]
    if kind == "classification":
        pairs = [one.pair or "" for one in asked] if asked[0].pair is not None else None
        return [next(iter(row.items())) for row in model.classify([one.text for one in asked], pairs)]
    found = [model.answer(one.question, one.context) for one in asked]
    if not all(isinstance(one, Found) for one in found):
        raise UserError("this model has no span head.", where="examples", cure="Tune it with task = answer.")
    return [(one.text, one.probability) for one in found if isinstance(one, Found)]


def _written(model: Model | Seq2Seq, asked: Sequence[Any], settings: Settings) -> list[Said]:
    """What the model writes for each source, greedily; sources are framed and cut as in training."""
    decoder = isinstance(model, Model)
    room = model.context - settings.max_tokens * decoder
    if room < 2:
        raise UserError(
            f"{settings.max_tokens} tokens of answer leave no room in a context of {model.context}.",
            where="examples",
            cure="Lower evaluate.max_tokens.",
        )
    prompts = [source_ids(model.tokenizer, settings.prefix + one.source, room, decoder=decoder) for one in asked]
    sampling = Sampling(max_tokens=settings.max_tokens)
    done = (
        [row[0] for row in model.answers(prompts, sampling)]
        if isinstance(model, Model)
        else model.answers(prompts, sampling)
    )
    return [(one.text.strip(), math.exp(min(0.0, sum(one.logprobs)))) for one in done]


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
        right = [float(a == b) for a, b in zip(labels, told, strict=True)]
        counts = metrics.class_counts(labels, told)
        return [_mean("accuracy", right, seed), ("macro F1", metrics.interval(counts, metrics.macro_f1, seed=seed))]
    if kind == "seq2seq":
        counts = np.array([metrics.chrf_counts(text, one.target) for text, one in zip(told, asked, strict=True)])
        rouge = [metrics.rouge_l(text, one.target) for text, one in zip(told, asked, strict=True)]
        return [("chrF", metrics.interval(counts, metrics.chrf, seed=seed)), _mean("ROUGE-L", rouge, seed)]
    pairs = [metrics.span_scores(text, one.answers) for text, one in zip(told, asked, strict=True)]
    return [_mean(name, [pair[at] for pair in pairs], seed) for at, name in enumerate(("exact match", "token F1"))]


def _mean(name: str, values: Sequence[float], seed: int) -> tuple[str, tuple[float, float, float]]:
    rows = np.stack([np.array(values), np.ones(len(values))], 1)
    return name, metrics.interval(rows, metrics.mean, seed=seed)


def _guessers(kind: str, train: Sequence[Any]) -> Iterator[Guesser]:
    """What can be said without a network."""
    if kind == "tokens":
        rows = [row for one in train for row in word_features(one.words)]
        tags = [tag for one in train for tag in one.tags]
        for penalty in PENALTIES:
            words = Linear(rows, tags, penalty=penalty, at_least=2)
            yield partial(_by_words, words)
    elif kind == "classification":
        rows = [text_features(one.text, one.pair) for one in train]
        for penalty in PENALTIES:
            texts = Linear(rows, [one.label for one in train], penalty=penalty)
            yield partial(_by_texts, texts)
    else:
        targets = [one.target if kind == "seq2seq" else one.answers[0] for one in train]
        common = Counter(targets).most_common(1)[0][0]
        yield lambda asked: [common] * len(asked)
        if kind == "seq2seq":
            share = sum(len(text.split()) for text in targets) / sum(len(one.source.split()) for one in train)
            yield lambda asked: [beginning(one.source, share) for one in asked]


def _by_words(model: Linear, asked: Sequence[Any]) -> list[Any]:
    return [model.predict(word_features(one.words)) for one in asked]


def _by_texts(model: Linear, asked: Sequence[Any]) -> list[Any]:
    return model.predict([text_features(one.text, one.pair) for one in asked])


def beginning(text: str, share: float) -> str:
    """The first words of a text: beginning("one two three four", 0.5) == "one two"."""
    words = text.split()
    return " ".join(words[: max(1, round(share * len(words)))])


def _answer(kind: str, one: Any, given: Any, sure: float) -> Answer:
    """An example as a row of answers.jsonl; of tags, the words that have one."""
    if kind == "tokens":
        prompt, expected, text = " ".join(one.words), _tagged(one.words, one.tags), _tagged(one.words, given)
        ok = list(one.tags) == list(given)
    elif kind == "classification":
        prompt = one.text if one.pair is None else f"{one.text}\n{one.pair}"
        expected, text, ok = one.label, given, one.label == given
    elif kind == "answer":
        prompt, expected, text = f"{one.context}\n{one.question}", one.answers[0], given
        ok = metrics.span_scores(given, one.answers)[0] == 1
    else:
        prompt, expected, text, ok = one.source, one.target, given, exact_match(given, one.target)
    return Answer(
        task="examples", skill=kind, prompt=prompt, expected=expected, given=text, ok=ok, confidence=sure
    )  # fmt: skip


def _tagged(words: Sequence[str], tags: Sequence[str]) -> str:
    return " ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True) if tag != "O")
