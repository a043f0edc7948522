"""Numbers with their uncertainty: means with 95 % intervals, the bar a guesser sets, calibration.

An interval says how far the value could move if other questions of the same sort had been asked. Questions about one person,
or tokens of one document, are not independent: `groups` resamples people or documents as a whole.

Shapes: N items, R resamples.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
RESAMPLES = 2000
CHUNK = 4_000_000  # resampled items held in memory at a time
BINS = 10


def normalise(text: str) -> str:
    """The form in which two answers are compared: normalise("  In  Brook. ") == "in brook".

    Unicode NFKC, case folded, runs of white space made one space, and white space, full stops, commas, colons, semicolons,
    exclamation and question marks taken from both ends, except a sign or point that belongs to a number.
    """
    words = unicodedata.normalize("NFKC", text).casefold().split()
    bare = " ".join(words).rstrip(" .,:;!?")
    return bare.lstrip(" ,:;!?")


def exact_match(given: str, *accepted: str) -> bool:
    """Whether the normalised answer equals one of the accepted ones; an empty answer never does."""
    return bool(normalise(given)) and normalise(given) in {normalise(answer) for answer in accepted}


def bootstrap(
    totals: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """The 95 % percentile interval of sum(totals) / sum(weights), items (or whole groups) drawn with replacement.

    Without `weights` that is the mean. Efron and Tibshirani 1993, chapter 13; ratio and clusters as in Davison and Hinkley 1997.
    """
    totals_N, weights_N = _by_group(totals, weights, groups)
    n = len(totals_N)
    generator = np.random.default_rng(seed)
    values: list[Floats] = []
    rows = max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        drawn_RN = generator.integers(0, n, (min(rows, resamples - start), n), dtype=np.int32)
        values.append(totals_N[drawn_RN].sum(1) / weights_N[drawn_RN].sum(1))
    low, high = np.quantile(np.concatenate(values), (0.025, 0.975))
    return float(low), float(high)


def wilson(successes: int, n: int, z: float = Z95) -> Interval:
    """The score interval of a proportion (Wilson 1927); unlike the bootstrap it stays honest at 0 % and 100 %."""
    assert 0 <= successes <= n > 0, (successes, n)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Exactly 0 and 1 at the ends; rounding would leave 1e-17.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def proportion(
    correct: Sequence[bool], *, groups: Sequence[Hashable] | None = None, seed: int = 0, rare: int = 5
) -> tuple[float, float, float]:
    """(value, low, high) of a share of right answers.

    Bootstrap, but Wilson where there are fewer than `rare` right or wrong answers: a sample without a single failure would
    give the bootstrap an interval of no width. There the groups, not their members, count as the n.
    """
    n, right = len(correct), sum(correct)
    if min(right, n - right) >= rare:
        return right / n, *bootstrap(np.asarray(correct, float), groups=groups, seed=seed)
    effective = n if groups is None else len(set(groups))
    low, high = wilson(round(right / n * effective), effective)
    return right / n, min(low, right / n), max(high, right / n)


def majority(asked: Sequence[str], reference: Iterable[str] | None = None) -> tuple[str, float]:
    """The answer a guesser gives who knows only how answers are distributed, and how often it is right on `asked`.

    `reference` are the answers seen in training. Without them the guesser is granted the test's own distribution, which no honest
    guesser has: the harder bar.
    """
    counts = Counter(map(normalise, asked if reference is None else reference))
    # The alphabet breaks ties, so that the bar doesn't depend on the order of the questions.
    guess = min(counts, key=lambda answer: (-counts[answer], answer))
    return guess, sum(normalise(answer) == guess for answer in asked) / len(asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Answers given with a confidence in [low, high): how sure the model was on average, and how often it was right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def reliability(confidence: Sequence[float], correct: Sequence[bool], bins: int = BINS) -> list[Bin]:
    """The bins of a reliability diagram, equally wide, empty ones left out (Guo et al. 2017)."""
    confidence_N, correct_N = np.asarray(confidence, float), np.asarray(correct, float)
    bin_N = _bin(confidence_N, bins)
    return [
        Bin(
            low=index / bins,
            high=(index + 1) / bins,
            n=int((bin_N == index).sum()),
            confidence=float(confidence_N[bin_N == index].mean()),
            accuracy=float(correct_N[bin_N == index].mean()),
        )
        for index in np.unique(bin_N).tolist()
    ]


def calibration_error(
    confidence: Sequence[float], correct: Sequence[bool], *, bins: int = BINS, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """(value, low, high) of the expected calibration error: mean over answers of |accuracy - confidence| of their bin.

    Guo et al. 2017, equation 3. It is biased upwards when bins are small, and so is its bootstrap interval, which therefore is
    stretched to contain the value.
    """
    confidence_N, correct_N = np.asarray(confidence, float), np.asarray(correct, float)
    bin_N, gap_N, n = _bin(confidence_N, bins), correct_N - confidence_N, len(confidence_N)
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // n)
    values: list[Floats] = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn_RN = generator.integers(0, n, (count, n), dtype=np.int32)
        place_RN = bin_N[drawn_RN] + np.arange(count)[:, None] * bins
        gaps = np.bincount(place_RN.ravel(), gap_N[drawn_RN].ravel(), minlength=count * bins)
        values.append(np.abs(gaps).reshape(count, bins).sum(1) / n)
    value = float(np.abs(np.bincount(bin_N, gap_N, minlength=bins)).sum() / n)
    low, high = np.quantile(np.concatenate(values), (0.025, 0.975)).tolist()
    return value, min(low, value), max(high, value)


def brier(confidence: Sequence[float], correct: Sequence[bool], *, seed: int = 0) -> tuple[float, float, float]:
    """(value, low, high) of the mean squared distance of confidence from being right (Brier 1950): 0 best, 0.25 a shrug."""
    squares = (np.asarray(confidence, float) - np.asarray(correct, float)) ** 2
    return float(squares.mean()), *bootstrap(squares, seed=seed)


def exposure(secret: float, others: Sequence[float], space: int) -> tuple[float, int]:
    """(exposure in bits, rank) of a secret whose loss is `secret` among `space` candidates, of which `others` were scored too.

    log2(space) - log2(rank): log2(e) on average for a model that never saw it, log2(space) when it is the likeliest of all
    (Carlini et al. 2019, The Secret Sharer, definition 4). When `others` are a sample, the rank is scaled up to the space,
    and no exposure above log2(len(others) + 1) can be told.
    """
    assert 0 < len(others) < space, (len(others), space)
    better = sum(loss < secret for loss in others)
    rank = 1 + better * (space - 1) / len(others)
    told = math.log2(space if len(others) == space - 1 else len(others) + 1)
    return min(told, math.log2(space) - math.log2(rank)), round(rank)


def _bin(confidence_N: Floats, bins: int) -> NDArray[np.int64]:
    return np.minimum((confidence_N * bins).astype(np.int64), bins - 1)


def _by_group(totals: ArrayLike, weights: ArrayLike | None, groups: Sequence[Hashable] | None) -> tuple[Floats, Floats]:
    totals_N = np.asarray(totals, float)
    weights_N = np.ones_like(totals_N) if weights is None else np.asarray(weights, float)
    assert len(totals_N) == len(weights_N) > 0, (len(totals_N), len(weights_N))
    if groups is None:
        return totals_N, weights_N
    number: dict[Hashable, int] = {}
    group_N = np.array([number.setdefault(group, len(number)) for group in groups])
    sums = [np.bincount(group_N, values_N).astype(np.float64) for values_N in (totals_N, weights_N)]
    return sums[0], sums[1]
