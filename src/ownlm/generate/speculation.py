"""Who gets a draft in a step, from where, and how far: decided by what drafts have brought and cost here (drafts.py).

Two sources. What followed the last time the text said this, it may say again (prompt lookup, which needs no model); and where there
is a second model, it writes ahead (drafter.py). For an answer the one is asked of which more came true.
"""

import time
from collections.abc import Mapping, Sequence

from ownlm.generate.drafter import Drafter
from ownlm.generate.drafts import LENGTHS, Costs, Draft, Share, Source
from ownlm.generate.sequence import Sequence as Text

GRAM = 3  # tokens that must have stood together before
LOOK = 50  # after so many steps with drafts one goes without: what writing takes grows with the texts


class Echoes:
    """Where each run of GRAM tokens of one text stood last, and how often what followed came again. Changes with the text."""

    def __init__(self, source: Source) -> None:
        self.share = Share(source)
        self.known = 0  # tokens that have been looked at
        self.after: dict[tuple[int, ...], int] = {}

    def find(self, text: list[int], length: int) -> list[int]:
        """What followed the text's last GRAM tokens where those stood before, and over again up to `length` tokens; else none."""
        # The run at the very end is not entered yet: it would find itself.
        for end in range(max(self.known, GRAM), len(text)):
            self.after[tuple(text[end - GRAM : end])] = end
        self.known = max(self.known, len(text))
        start = self.after.get(tuple(text[-GRAM:]))
        if start is None:
            return []
        followed = text[start : start + length]
        return [followed[place % len(followed)] for place in range(length)]


class Speculation:
    """Drafts for the answers of one engine. For one thread; changes with every step.

    drafter: a small model that writes ahead; None: what the texts repeat is all there is.
    """

    def __init__(self, drafter: Drafter | None) -> None:
        self.drafter, self.lookup = drafter, Source()
        self.sources = [self.lookup] if drafter is None else [self.lookup, drafter.source]
        self.echoes: dict[Text, Echoes] = {}
        self.costs = Costs()
        self.since: dict[int, int] = {}  # steps with drafts since so many answers went without

    @property
    def drafted_tokens(self) -> int:
        """How many tokens were ever drafted."""
        return sum(source.drafted for source in self.sources)

    @property
    def accepted_tokens(self) -> int:
        """How many of them came true."""
        return sum(source.accepted for source in self.sources)

    def forget(self, sequence: Text) -> None:
        """Drop what is known of an answer that has ended, was cancelled or waits again. Unknown ones are no error."""
        self.echoes.pop(sequence, None)
        if self.drafter is not None:
            self.drafter.forget(sequence)

    def drafts(self, writing: Sequence[Text]) -> dict[Text, Draft]:
        """What these answers, who are all that run, may say next, no longer than they may become; none where that doesn't pay."""
        alone, drafts = self.costs.without(len(writing)), dict[Text, Draft]()
        looking = self.since.get(len(writing), 0) >= LOOK
        if alone is None or looking or not any(source.open for source in self.sources):
            return drafts
        able = [each for each in writing if each.limit - each.new_tokens > 1]
        found = self._found(able) if self.lookup.open else {}
        if self.drafter is not None and self.drafter.source.open:
            others = [each for each in able if each not in found or self._better(each, self.drafter)]
            drafts = self.drafter.drafts(others, len(writing), self.costs.curve(self.costs.beside, alone))
            found = {each: tokens for each, tokens in found.items() if each not in drafts}
        return drafts | self._repeated(found, len(writing), drafts, alone) if found else drafts

    def ran(self, answers: int, drafted: Mapping[Source, int], seconds: float) -> None:
        """After a step in which so many answers were written on and nobody read a prompt; `drafted`: how many drafted tokens it read."""
        if drafted:
            guesses = sum(drafted.values())
            counted = self.costs.saw(answers + guesses, seconds, drafted=True)
            alone = self.costs.without(answers) or counted
            for source, tokens in drafted.items():
                source.charge((counted - alone) * tokens / guesses)
            self.since[answers] = self.since.get(answers, 0) + 1
        else:
            alone = self.costs.saw(answers, seconds)
            self.since[answers] = 0
        for source in self.sources:
            source.passed(seconds, alone / answers)

    # ---- what the texts repeat

    def _found(self, able: Sequence[Text]) -> dict[Text, list[int]]:
        began, found = time.perf_counter(), {}
        for sequence in able:
            if sequence not in self.echoes:
                self.echoes[sequence] = Echoes(self.lookup)
            if tokens := self.echoes[sequence].find(sequence.known, LENGTHS[-1]):
                found[sequence] = tokens
        self.lookup.charge(time.perf_counter() - began)
        return found

    def _better(self, sequence: Text, drafter: Drafter) -> bool:
        return drafter.share(sequence).value > self.echoes[sequence].share.value

    def _repeated(
        self, found: dict[Text, list[int]], rows: int, others: dict[Text, Draft], alone: float
    ) -> dict[Text, Draft]:
        """Those of the found drafts that pay beside the `others`, or a try."""
        began = time.perf_counter()
        shares = {each: self.echoes[each].share for each in found}
        tokens = rows + sum(draft.share.gain(len(draft.tokens)) - 1 for draft in others.values())
        rows += sum(len(draft.tokens) for draft in others.values())
        seconds = self.costs.curve(self.costs.beside, alone)
        chosen, length = self.lookup.plan(shares, rows, tokens, seconds)
        if not chosen:
            chosen, length = [min(shares, key=lambda each: shares[each].tested)], LENGTHS[0]
            self.lookup.trying(alone, seconds(rows + length) - seconds(rows))
        self.lookup.charge(time.perf_counter() - began)
        return {
            each: Draft(found[each][: min(length, each.limit - each.new_tokens - 1)], shares[each]) for each in chosen
        }
