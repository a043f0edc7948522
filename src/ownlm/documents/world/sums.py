"""Sums of two numbers of two digits, with pairs that no document and no conversation ever shows.

Asked in two ways: for the result at once, which needs the carry before the first digit is written, and step by step, where
each step adds digits only (Nye et al. 2021, Show Your Work).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

CHOICES = tuple(str(total) for total in range(20, 199))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """All unordered pairs of 10..99: `seen` in documents and tuning, `asked` in the test, `reward` for RL only."""

    seen: list[tuple[int, int]]
    asked: list[tuple[int, int]]
    reward: list[tuple[int, int]]


def pairs(rng: random.Random, asked: int, reward: int) -> Pairs:
    """The division for one world. A pair and its mirror image are on the same side."""
    every = [(a, b) for a in range(10, 100) for b in range(a, 100)]
    rng.shuffle(every)
    return Pairs(asked=every[:asked], reward=every[asked : asked + reward], seen=every[asked + reward :])


def _either_way(rng: random.Random, pair: tuple[int, int]) -> tuple[int, int]:
    return pair if rng.random() < 0.5 else (pair[1], pair[0])


def document(rng: random.Random, seen: Sequence[tuple[int, int]], lines: int = 6) -> str:
    """A page of sums: in a row, each with its result on a line of its own, or step by step."""
    sums = [_either_way(rng, pair) for pair in rng.sample(seen, k=lines)]
    form = rng.randrange(3)
    if form == 0:
        steps = "".join(f"\n{a} + {b}\n{working(a, b)}" for a, b in sums[: lines // 2])
        return f"Sums in the book, step by step{steps}"
    if form == 1:
        return "Sums on the blackboard: " + ", ".join(f"{a} + {b} = {a + b}" for a, b in sums) + "."
    return "Sums in the book" + "".join(f"\n{a} + {b}\n{a + b}" for a, b in sums)


def working(a: int, b: int) -> str:
    """The sum as it is done by hand: working(27, 45) == "7 + 5 = 12, 1 + 2 + 4 = 7, so 72"."""
    ones = a % 10 + b % 10
    carry, tens = ones // 10, a // 10 + b // 10
    return f"{a % 10} + {b % 10} = {ones}, {carry} + {a // 10} + {b // 10} = {carry + tens}, so {a + b}"


def question(rng: random.Random, pair: tuple[int, int], *, steps: bool) -> tuple[str, str]:
    """A prompt and its answer: the result, or the whole working."""
    a, b = _either_way(rng, pair)
    return (f"What is {a} + {b}, step by step?", working(a, b)) if steps else (f"What is {a} + {b}?", str(a + b))
