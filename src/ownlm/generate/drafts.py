"""Drafts of what an answer may say next: how often they come true, what they cost, and when they are worth it.

    what each draft of a source brought and cost ─► Source ─► plan: for whom, and how far ─┬─ it pays by all that is known
                                                                                           └─ it doesn't: a try now and then

A draft is read together with the last token, a row for each of its tokens. The answer is then sampled place by place as always, from
the model's own distribution and with the answer's own random numbers, and goes on through the draft as long as the sampled token is
the drafted one. So speculation changes neither the distribution nor the text, only how many tokens a step gives.

What it gains is foretold from how many drafted tokens came true, of this answer and of those before; what it costs, from what steps of
so many rows have taken here. And a source keeps accounts: drafts that took more time than the tokens they brought would have taken are
paid from PRICE of the time that passes, so a source that loses takes no more than that, however wrong the forecast.

Where drafts come from: the text itself (speculation.py), a second model (drafter.py).
"""

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

T = TypeVar("T")

LENGTHS = (2, 4, 7)  # drafted tokens; a block of the kernels holds eight rows
WORTH = 1.05  # of the tokens a second without: what a draft must promise
PRICE = 0.01  # of the time: what a source may lose
SAVED = 50  # steps, whose time a source has at most to lose, and to begin with
TRIES = 2  # drafts that a source which doesn't pay saves for
PRIOR = 0.6  # the share that comes true of a source nothing is known of
FEW = 5  # tokens that a share known beforehand counts for
MEMORY, LONG_MEMORY = 0.95, 0.99  # what is left of what an answer, a source showed after another tested token
QUICK = 0.2  # of the newest step, in the pace of the moment
STEADY = 50  # steps that the mean of a number of rows goes back
SPIKE = math.log(2)  # what something else held up counts as twice as long


class Source:
    """What drafts of one kind have brought and cost, over all answers. Changes with every step.

    balance: seconds that its drafts may lose. open: whether there may be any now; one that has lost all waits until it has saved
    what a few tries need.
    """

    def __init__(self) -> None:
        self.balance = math.inf  # until it is known what a step takes
        self.open, self.need = True, 0.0
        self.tested, self.true = float(FEW), FEW * PRIOR
        self.won = 0  # tokens, in this step
        self.drafted = self.accepted = 0  # tokens, ever

    @property
    def usual(self) -> float:
        """The share of drafted tokens that comes true."""
        return self.true / self.tested

    def passed(self, seconds: float, worth: float) -> None:
        """After a step, with drafts or without; `worth`: the seconds that a token takes without."""
        if self.won:
            self.balance += self.won * worth
            self.won = 0
        self.balance = min(self.balance + PRICE * seconds, SAVED * seconds)
        self.open = self.balance > (0 if self.open else self.need)

    def charge(self, seconds: float) -> None:
        """Pay for drafts, or for finding some."""
        self.balance -= seconds

    def trying(self, step: float, draft: float, ready: float = 0.0) -> None:
        """Before a draft that isn't expected to pay: a few such may be lost, whatever has been saved. The seconds that a step takes
        without drafts, that a draft adds to it, and that it takes to get ready for drafts."""
        self.need = max(step, TRIES * draft + ready)
        self.balance = min(self.balance, self.need)

    def learn(self, drafted: int, accepted: int) -> None:
        """After a draft of which so many tokens came true. What comes after the first miss says nothing."""
        tests = min(accepted + 1, drafted)
        kept = LONG_MEMORY**tests
        self.tested, self.true = kept * self.tested + tests, kept * self.true + accepted
        self.won += accepted
        self.drafted += drafted
        self.accepted += accepted

    def plan(
        self,
        shares: "Mapping[T, Share]",
        rows: int,
        tokens: float,
        seconds: Callable[[int], float],
        drafting: Callable[[int, int], float] = lambda count, length: 0.0,
    ) -> tuple[list[T], int]:
        """(for whom of these, how many tokens): what gives the most tokens a second; nobody where nothing pays.

        rows, tokens: of the step without these drafts, and what it is expected to give. seconds: of a step by its rows.
        drafting: the seconds that drafts for so many take, of so many tokens each.
        """
        best: tuple[int, int] = (0, 0)
        most = WORTH * tokens / seconds(rows)
        order = sorted(shares, key=lambda each: -shares[each].value)
        for length in LENGTHS:
            more = tokens
            for count, each in enumerate(order, start=1):
                more += shares[each].gain(length) - 1
                rate = more / (seconds(rows + count * length) + drafting(count, length))
                if rate > most:
                    best, most = (count, length), rate
        return order[: best[0]], best[1]


@dataclass(slots=True, eq=False)
class Share:
    """How often what one source drafts for one answer comes true: what it was for others, until this answer has shown more."""

    source: Source
    tested: float = 0.0
    true: float = 0.0

    @property
    def value(self) -> float:
        return (self.true + FEW * self.source.usual) / (self.tested + FEW)

    def learn(self, drafted: int, accepted: int) -> None:
        """After a draft of which so many tokens came true."""
        tests = min(accepted + 1, drafted)
        kept = MEMORY**tests
        self.tested, self.true = kept * self.tested + tests, kept * self.true + accepted
        self.source.learn(drafted, accepted)

    def gain(self, length: int) -> float:
        """How many tokens a step gives with a draft of this length, in the mean."""
        value = self.value
        return (1 - value ** (length + 1)) / (1 - value) if value < 1 else length + 1


@dataclass(frozen=True, slots=True)
class Draft:
    """What an answer may say next, and the share that is told how much of it came true."""

    tokens: list[int]
    share: Share


class Costs:
    """What steps take here, by their number of rows, without drafts and with: each relative to the others, and all to the pace of the
    moment, which longer texts and other programs change for all alike. Changes with every step."""

    def __init__(self) -> None:
        self.pace = 0.0  # seconds; none seen yet
        self.alone: dict[int, float] = {}
        self.beside: dict[int, float] = {}
        self.seen: Counter[tuple[int, bool]] = Counter()

    def saw(self, rows: int, seconds: float, *, drafted: bool = False) -> float:
        """Take note of a step; the seconds that it counts as."""
        table = self.beside if drafted else self.alone
        self.pace = self.pace or seconds
        self.seen[rows, drafted] += 1
        if rows not in table:
            table[rows] = seconds / self.pace
            return seconds
        expected = table[rows] * self.pace
        off = max(-SPIKE, min(math.log(seconds / expected), SPIKE))
        self.pace *= math.exp(QUICK * off)
        table[rows] *= math.exp((1 - QUICK) * off / min(self.seen[rows, drafted], STEADY))
        return expected * math.exp(off)

    def without(self, rows: int) -> float | None:
        """What a step of so many rows takes without drafts; None where none was seen."""
        relative = self.alone.get(rows)
        return None if relative is None else relative * self.pace

    def curve(self, table: Mapping[int, float], least: float) -> Callable[[int], float]:
        """What a step of so many rows takes by one of the tables: as seen (and no more than one of more rows took), else as one of
        fewer rows; at least `least`, which is also what is expected where none of as few was seen."""
        counts = sorted(table)
        bounds = list(accumulate((table[count] for count in reversed(counts)), min))[::-1]

        def of(rows: int) -> float:
            place = bisect_right(counts, rows) - 1
            return max(least, bounds[place] * self.pace) if place >= 0 else least

        return of
