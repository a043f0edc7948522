"""Speculation without a second model: what followed the last time the text said this, it may say again (prompt lookup).

A draft is read together with the last token, a row for each of its tokens. The answer is then sampled place by place as always, from
the model's own distribution and with the answer's own random numbers, and goes on through the draft as long as the sampled token is
the drafted one. So speculation changes neither the distribution nor the text, only how many tokens a step gives.

It is used where it pays: the gain is foretold from how many drafted tokens of this answer came true, the cost from what steps of
so many rows have taken here. A second model that drafts: drafter.py.
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

LENGTHS = (2, 4, 7)  # drafted tokens; a block of the kernels holds eight rows
GRAM = 3  # tokens that must have stood together before
WORTH = 1.05
PRIOR, MEMORY = 0.6, 0.9  # the share that comes true of an answer nothing is known of; how slowly it changes
RESTED = 0.99  # how slowly it is forgotten


@dataclass(slots=True)
class Share:
    """How often what one source drafts for one answer comes true."""

    value: float = PRIOR

    def learn(self, drafted: int, accepted: int) -> None:
        """After a draft of which so many tokens came true. What comes after the first miss says nothing."""
        for place in range(min(accepted + 1, drafted)):
            self.value = MEMORY * self.value + (1 - MEMORY) * (place < accepted)

    def rest(self) -> None:
        """After a step without a draft: what was learned grows old, for texts change."""
        self.value = RESTED * self.value + (1 - RESTED) * PRIOR

    def gain(self, length: int) -> float:
        """How many tokens a step gives with a draft of this length, in the mean."""
        return (1 - self.value ** (length + 1)) / (1 - self.value) if self.value < 1 else length + 1


@dataclass(frozen=True, slots=True)
class Draft:
    """What an answer may say next, and the share that is told how much of it came true."""

    tokens: list[int]
    share: Share


@dataclass(slots=True)
class Echoes:
    """Where each run of GRAM tokens of one text stood last, and how often what followed came again."""

    share: Share = field(default_factory=Share)
    known: int = 0  # tokens that have been looked at
    after: dict[tuple[int, ...], int] = field(default_factory=dict)

    def find(self, text: list[int], length: int) -> list[int]:
        """Up to `length` tokens that followed the text's last GRAM tokens where those stood before."""
        # The run at the very end is not entered yet: it would find itself.
        for end in range(max(self.known, GRAM), len(text)):
            self.after[tuple(text[end - GRAM : end])] = end
        self.known = max(self.known, len(text))
        start = self.after.get(tuple(text[-GRAM:]))
        return [] if start is None else text[start : start + length]


class Costs:
    """What steps of writing take here, by their number of rows."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def saw(self, rows: int, seconds: float) -> None:
        before = self.seconds.get(rows)
        self.seconds[rows] = seconds if before is None else 0.8 * before + 0.2 * seconds

    def curve(self) -> Callable[[int], float | None]:
        """What a step of so many rows takes: as seen (and no more than one of more rows took), else as one of fewer rows. None
        where none of as few was seen."""
        counts = sorted(self.seconds)
        least = list(accumulate((self.seconds[count] for count in reversed(counts)), min))[::-1]

        def of(rows: int) -> float | None:
            place = bisect_right(counts, rows) - 1
            return least[place] if place >= 0 else None

        return of

    def length(self, rows: int, share: Share) -> int:
        """How long a draft pays best beside `rows` rows, 0 where none does. What was never seen is tried."""
        alone = self.seconds.get(rows)
        if alone is None:
            return 0
        best, most = 0, WORTH
        for length in LENGTHS:
            cost = self.seconds.get(rows + length, alone) / alone
            if share.gain(length) / cost > most:
                best, most = length, share.gain(length) / cost
        return best
