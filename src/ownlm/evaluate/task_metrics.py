"""Metrics of labelled tasks, as counts per item, so that an interval can be had by drawing items again.

    classification   accuracy, macro-F1                 tokens    accuracy of words; F1 of whole entities (CoNLL-2003)
    answer           exact match, token F1 (SQuAD)      seq2seq   chrF (Popović 2015), ROUGE-L (Lin 2004)

Shapes: N items, C classes, R resamples.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RESAMPLES = 1000
CHRF_ORDER, CHRF_BETA = 6, 2.0
WORD = re.compile(r"[a-z0-9]+")  # what ROUGE counts as a word
ARTICLES = re.compile(r"\b(a|an|the)\b")


def interval(counts_NK: Floats, metric: Callable[[Floats], float], *, seed: int = 0) -> tuple[float, float, float]:
    """(value, low, high) of a metric of summed counts: items are drawn again with replacement (Efron and Tibshirani 1993)."""
    n = len(counts_NK)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(RESAMPLES):
        weights_N = np.bincount(generator.integers(0, n, n), minlength=n).astype(float)
        values.append(metric(weights_N @ counts_NK))
    low, high = np.quantile(values, (0.025, 0.975)).tolist()
    value = metric(counts_NK.sum(0))
    return value, min(low, value), max(high, value)


def class_counts(truth: Sequence[Hashable], given: Sequence[Hashable]) -> Floats:
    """(N, 3C): for each class whether an item is rightly in it, is put into it, belongs to it."""
    number = {label: index for index, label in enumerate(sorted({*truth, *given}, key=str))}
    counts = np.zeros((len(truth), 3, len(number)))
    for row, (right, said) in enumerate(zip(truth, given, strict=True)):
        counts[row, 0, number[right]] = right == said
        counts[row, 1, number[said]] = counts[row, 2, number[right]] = 1
    return counts.reshape(len(truth), -1)


def macro_f1(sums: Floats) -> float:
    """The mean over classes of F1, of classes that are there; from summed `class_counts`."""
    right_C, said_C, there_C = sums.reshape(3, -1)
    known = said_C + there_C > 0
    return float((2 * right_C[known] / (said_C + there_C)[known]).mean())


def f1(sums: Floats) -> float:
    """2 right / (said + there), from summed (right, said, there); 0 where there is nothing."""
    right, said, there = sums
    return float(2 * right / (said + there)) if said + there else 0.0


def mean(sums: Floats) -> float:
    """Of summed (value, weight)."""
    return float(sums[0] / sums[1]) if sums[1] else 0.0


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, word after the last) by the rules of CoNLL's scorer:
    entities(["B-a", "I-a", "O", "I-b"]) == {("a", 0, 2), ("b", 3, 4)}.

    An entity begins at B, and at an I that follows nothing, or another type; it ends before any of these and before O.
    """
    found, start, kind = set(), 0, ""
    for at, tag in enumerate([*tags, "O"]):
        mark, _, label = tag.partition("-")
        if kind and (mark != "I" or label != kind):
            found.add((kind, start, at))
            kind = ""
        if label and not kind:
            start, kind = at, label
    return found


def entity_counts(truth: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> Floats:
    """(N, 3): of each sentence the entities found rightly, said, and there."""
    rows = []
    for right, said in zip(truth, given, strict=True):
        a, b = entities(right), entities(said)
        rows.append([len(a & b), len(b), len(a)])
    return np.array(rows, float)


def word_counts(truth: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> Floats:
    """(N, 2): of each sentence the words labelled rightly, and all."""
    return np.array(
        [[sum(a == b for a, b in zip(x, y, strict=True)), len(x)] for x, y in zip(truth, given, strict=True)], float
    )


def bare(text: str) -> str:
    """Lower case, without punctuation, articles and needless spaces, as SQuAD compares: bare("The  cat!") == "cat"."""
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def span_scores(given: str, accepted: Sequence[str]) -> tuple[float, float]:
    """(exact match, token F1) with the accepted answer that fits best (arXiv:1606.05250, 6.1)."""
    said = bare(given).split()
    best = 0.0
    for one in accepted:
        there = bare(one).split()
        same = (Counter(said) & Counter(there)).total()
        best = max(best, float(said == there) if not said or not there else 2 * same / (len(said) + len(there)))
    return float(bare(given) in {bare(one) for one in accepted}), best


def chrf_counts(given: str, right: str) -> Floats:
    """(18,): of character n-grams of length 1 … 6, white space left out, how many are shared, said, and there."""
    said, there = "".join(given.split()), "".join(right.split())
    counts = []
    for order in range(1, CHRF_ORDER + 1):
        a, b = (Counter(text[at : at + order] for at in range(len(text) - order + 1)) for text in (said, there))
        counts.append([(a & b).total(), a.total(), b.total()])
    return np.array(counts, float).T.reshape(-1)


def chrf(sums: Floats) -> float:
    """chrF2 of a corpus, 0 … 1: the mean over n of F2 of the n-grams (Popović, WMT 2015), from summed `chrf_counts`."""
    same_O, said_O, there_O = sums.reshape(3, CHRF_ORDER)
    known = (said_O > 0) & (there_O > 0)
    if not known.any():
        return 0.0
    precision, recall = same_O[known] / said_O[known], same_O[known] / there_O[known]
    factor = CHRF_BETA**2
    below = factor * precision + recall
    scores = np.where(below > 0, (1 + factor) * precision * recall / np.where(below > 0, below, 1), 0.0)
    return float(scores.mean())


def rouge_l(given: str, right: str) -> float:
    """F1 of the longest common subsequence of words: rouge_l("a cat sat", "a cat ran") == 2 / 3."""
    said, there = (WORD.findall(text.lower()) for text in (given, right))
    if not said or not there:
        return 0.0
    row = [0] * (len(there) + 1)
    for word in said:
        before = row[:]
        for at, other in enumerate(there):
            row[at + 1] = before[at] + 1 if word == other else max(before[at + 1], row[at])
    return 2 * row[-1] / (len(said) + len(there))
