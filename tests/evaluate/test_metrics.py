"""Intervals and calibration against published values, formulas and naive loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ownlm.evaluate import metrics


def test_normalise() -> None:
    assert metrics.normalise("  In  Brook.\n") == "in brook"
    assert metrics.normalise("Straße!") == "strasse"
    assert metrics.normalise("ﬁve") == "five"  # NFKC takes the ligature apart
    assert metrics.normalise("-734") == "-734"
    assert metrics.normalise(".5") == ".5"
    assert metrics.exact_match("Unknown.", "unknown")
    assert metrics.exact_match("Onion skins", "Onion", "onion skins")
    assert not metrics.exact_match("", "")
    assert not metrics.exact_match("in the Brook", "Brook")


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert metrics.wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_is_symmetric_and_contains_the_share(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = metrics.wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = metrics.wilson(n - successes, n)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_bootstrap_of_a_mean_equals_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 500)
    low, high = metrics.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_bootstrap_of_a_ratio_equals_the_delta_method() -> None:
    random = np.random.default_rng(1)
    sizes = random.integers(50, 500, 400).astype(float)
    bits = sizes * 2.0 + random.normal(0, 30, 400)
    ratio = bits.sum() / sizes.sum()
    half = 1.96 * math.sqrt(((bits - ratio * sizes) ** 2).sum()) / sizes.sum()
    low, high = metrics.bootstrap(bits, sizes)
    assert (low, high) == pytest.approx((ratio - half, ratio + half), abs=0.15 * half)


def test_groups_are_drawn_whole() -> None:
    """Ten copies of each item are no more evidence than one: the grouped interval is that of the items."""
    values = np.random.default_rng(2).normal(size=100)
    groups = [f"person {index}" for index in range(100)] * 10
    repeated = np.tile(values, 10)
    assert metrics.bootstrap(repeated, groups=groups, seed=5) == pytest.approx(metrics.bootstrap(values, seed=5))
    low, high = metrics.bootstrap(repeated, seed=5)
    wide = metrics.bootstrap(values, seed=5)
    assert (wide[1] - wide[0]) / (high - low) == pytest.approx(math.sqrt(10), rel=0.1)


def test_bootstrap_depends_on_the_seed_only(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(range(100))
    first = metrics.bootstrap(values, seed=3)
    assert metrics.bootstrap(values, seed=3) == first
    assert metrics.bootstrap(values, seed=4) != first


def test_a_share_without_failures_still_has_width() -> None:
    assert metrics.proportion([True] * 100) == (1.0, *metrics.wilson(100, 100))
    # 25 people with four questions each are 25 pieces of evidence.
    people = [index // 4 for index in range(100)]
    assert metrics.proportion([True] * 100, groups=people) == (1.0, *metrics.wilson(25, 25))
    value, low, high = metrics.proportion([True] * 60 + [False] * 40)
    assert (value, low, high) == pytest.approx((0.6, 0.504, 0.696), abs=0.011)


def test_majority() -> None:
    asked = ["red", "Red", "blue", "green"]
    assert metrics.majority(asked) == ("red", 0.5)
    assert metrics.majority(asked, ["blue", "blue", "red"]) == ("blue", 0.25)
    assert metrics.majority(["b", "a"]) == ("a", 0.5)


def test_calibration_against_a_loop() -> None:
    random = np.random.default_rng(3)
    confidence = random.random(2000).tolist()
    correct = [bool(random.random() < share**2) for share in confidence]
    gaps = 0.0
    for index in range(10):
        members = [i for i, share in enumerate(confidence) if index / 10 <= share < (index + 1) / 10]
        gap = sum(correct[i] for i in members) / len(members) - sum(confidence[i] for i in members) / len(members)
        gaps += len(members) / 2000 * abs(gap)
    value, low, high = metrics.calibration_error(confidence, correct)
    assert value == pytest.approx(gaps)
    assert low <= value <= high
    assert value == pytest.approx(1 / 6, abs=0.02)  # the mean of p - p^2 over [0, 1]
    bins = metrics.reliability(confidence, correct)
    assert sum(bin.n for bin in bins) == 2000
    assert bins[-1].accuracy == pytest.approx(0.9, abs=0.06)
    assert metrics.reliability([1.0], [True])[0].low == 0.9


def test_brier() -> None:
    assert metrics.brier([1.0, 0.0], [True, False])[0] == 0.0
    assert metrics.brier([0.5] * 4, [True, False, True, True])[0] == 0.25
    assert metrics.brier([1.0, 0.8], [False, True])[0] == pytest.approx((1 + 0.04) / 2)


def test_exposure_of_a_known_distribution() -> None:
    losses = list(range(1, 1024))
    assert metrics.exposure(0, losses, 1024) == (10.0, 1)
    assert metrics.exposure(1024, losses, 1024) == (0.0, 1024)
    assert metrics.exposure(15.5, losses, 1024) == (10.0 - 4.0, 16)
    # A sample of 99 in a space of a million: the rank is scaled, and more than log2(100) bits can't be told.
    assert metrics.exposure(0, list(range(1, 100)), 10**6)[0] == pytest.approx(math.log2(100))
    bits, rank = metrics.exposure(50.5, list(range(1, 101)), 10**6)
    assert rank == pytest.approx(500_000, rel=0.01)
    assert bits == pytest.approx(1.0, abs=0.01)


def test_exposure_of_a_random_secret_is_log2_e_on_average() -> None:
    bits = [metrics.exposure(rank - 0.5, range(1, 1024), 1024)[0] for rank in range(1, 1025)]
    assert sum(bits) / len(bits) == pytest.approx(math.log2(math.e), abs=0.01)
