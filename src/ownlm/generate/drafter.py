"""Speculation with a second model: a small one of the same vocabulary writes ahead, and the big one reads what it wrote.

    answers that write ─► for whom, and how far: what pays ─► catch up: read what the big model wrote since ─► write ahead

A draft is what the small model says in the place of the big one: under the answer's own settings and with the very random numbers
that the answer is going to be drawn with, read from a copy of its generator. So two models that agree draw the same token, at any
temperature. The answer itself is sampled from the big model place by place as always (drafts.py): the same text, sooner.

It is used where it pays (drafts.py), and all it takes is on its account: reading, writing, and deciding. An answer is caught up with only
once it has been writing for as long as that takes: a word or two are never worth a long prompt.

The small model keeps a cache of its own, over its own pages, with shared beginnings like the big one's. What it wrote ahead and was
right stays; where an answer ends, is cancelled or loses its pages, the small model's pages of it are free at once.
"""

import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.generate.drafts import LENGTHS, Costs, Draft, Share, Source
from ownlm.generate.pages import PagePool, page_keys
from ownlm.generate.runners import Runner, salt
from ownlm.generate.sampling import Sampling, sample
from ownlm.generate.sequence import Row, Sequence
from ownlm.models.decoder import Decoder
from ownlm.tokens.codec import Tokenizer

ALONG = 8  # tokens that are read in the step that writes; more are caught up with first
UNKNOWN = 16  # tokens that are caught up with while nothing is known of what they cost
SLOWER = 0.7  # of a step of the big model: what catching up may take beside it


@dataclass(slots=True, eq=False)
class Shadow:
    """What the small model knows of one answer. Changes with every draft. `text` is the answer over the small model's pages; the
    tokens of `ahead` stand in them behind the known ones."""

    text: Sequence
    sampling: Sampling
    share: Share
    ahead: list[int] = field(default_factory=list)

    def agree(self) -> None:
        """Keep of what was written ahead as much as the answer has become."""
        known = self.text.known
        for token in self.ahead:
            if self.text.cached >= len(known) or known[self.text.cached] != token:
                break
            self.text.cached += 1
        self.ahead.clear()


class Drafter:
    """Writes drafts for the answers of one engine. For one thread; changes with every call."""

    def __init__(self, model: Decoder, runner: Runner, *, context: int) -> None:
        """`context`: positions of a sequence that the small model reads at most."""
        self.model, self.runner = model, runner
        self.context = min(context, model.config.max_tokens)
        self.pool = PagePool(runner.pages, runner.page_tokens)
        self.shadows: dict[Sequence, Shadow] = {}
        self.source, self.costs = Source(), Costs()
        self.token_seconds = 0.0

    def share(self, sequence: Sequence) -> Share:
        """How much of what was drafted for this answer came true."""
        return self._shadow(sequence).share

    def forget(self, sequence: Sequence) -> None:
        """Free the pages of an answer that has ended, was cancelled or waits again. Unknown ones are no error."""
        shadow = self.shadows.pop(sequence, None)
        if shadow is not None:
            self.pool.release(shadow.text.pages)

    def drafts(
        self, answers: SequenceOf[Sequence], rows: int, seconds: Callable[[int], float]
    ) -> dict[Sequence, Draft]:
        """What these answers may say next; for some of them, or none, where that doesn't pay. `rows`: of the big model's step
        without drafts; `seconds`: of its steps by their rows."""
        began = time.perf_counter()
        shares = {each: self.share(each) for each in answers if self._able(each)}
        drafts: dict[Sequence, Draft] = {}
        if shares:
            of_small = self.costs.curve(self.costs.alone, 0.0)
            chosen, length = self.source.plan(
                shares, rows, rows, seconds, lambda count, length: length * of_small(count)
            )
            if not chosen:
                chosen, length = [min(shares, key=self._behind)], LENGTHS[0]
                more = seconds(rows + length) - seconds(rows) + length * of_small(1)
                self.source.trying(seconds(rows), more, self._behind(chosen[0]) * self.token_seconds)
            ready = self._caught_up(chosen, seconds(rows))
            drafts = self._write_ahead(ready, length)
        self.source.charge(time.perf_counter() - began)
        return drafts

    # ---- for whom

    def _shadow(self, sequence: Sequence) -> Shadow:
        shadow = self.shadows.get(sequence)
        if shadow is None:
            vocab_size = self.model.config.vocab_size
            bias = tuple(pair for pair in sequence.sampling.logit_bias if pair[0] < vocab_size)
            shadow = self.shadows[sequence] = Shadow(
                text=replace(sequence, pages=[], keys=[], cached=0),  # `known` stays the answer's own list
                sampling=replace(sequence.sampling, logprobs=0, logit_bias=bias),
                share=Share(self.source),
            )
        return shadow

    def _able(self, sequence: Sequence) -> bool:
        """The small model sees no images, and has a context of its own and perhaps fewer places in its vocabulary."""
        fits = len(sequence.known) + LENGTHS[0] <= self.context and sequence.embeds_TD is None
        return fits and max(sequence.known[self._shadow(sequence).text.cached :]) < self.model.config.vocab_size

    # ---- catch up

    def _behind(self, sequence: Sequence) -> int:
        """How many tokens of an answer are to be read before there can be a draft."""
        text = self._shadow(sequence).text
        return max(0, len(text.known) - text.cached - ALONG)

    def _caught_up(self, answers: SequenceOf[Sequence], seconds: float) -> list[Sequence]:
        """Those of which the small model has read nearly all. Of others it reads what takes a part of `seconds`, a step's time."""
        budget = int(SLOWER * seconds / self.token_seconds) if self.token_seconds else UNKNOWN
        ready, rows = [], []
        for sequence in answers:
            text = self._agreed(sequence)
            behind = len(text.known) - text.cached
            if behind <= ALONG:
                ready.append(sequence)
            elif behind * self.token_seconds <= min(sequence.new_tokens * seconds, self.source.balance) and budget > 0:
                tokens = text.known[text.cached : -1][: max(budget, ALONG)]
                if self._grow(text, text.cached + len(tokens)):
                    rows.append(Row(text, tokens, 0))
                    budget -= len(tokens)
        if rows:
            began = time.perf_counter()
            self.runner.run(rows)
            each = (time.perf_counter() - began) / sum(len(row.tokens) for row in rows)
            self.token_seconds = each if not self.token_seconds else 0.8 * self.token_seconds + 0.2 * each
            for row in rows:
                self._has_read(row)
        return ready

    def _agreed(self, sequence: Sequence) -> Sequence:
        """The small model's side of an answer, with what it wrote ahead and what another text has read before."""
        shadow = self._shadow(sequence)
        shadow.agree()
        text = shadow.text
        if not text.pages:
            text.keys = page_keys(text.known[:-1], self.pool.size, salt(self.model, text))
            text.pages = self.pool.share(text.keys)
            del text.keys[len(text.pages) :]
            text.cached = len(text.pages) * self.pool.size
        return text

    def _grow(self, text: Sequence, length: int) -> bool:
        """Pages for `length` tokens; False where there are none: a draft is not worth the pages of another."""
        more = self.pool.take(max(0, -(-length // self.pool.size) - len(text.pages)))
        text.pages += more or []
        return more is not None

    def _has_read(self, row: Row) -> None:
        text = row.sequence
        text.cached += len(row.tokens)
        if text.cached // self.pool.size > len(text.keys):
            text.keys = self.pool.offer(text.known[: text.cached], text.pages, text.keys, salt(self.model, text))

    # ---- write ahead

    def _write_ahead(self, answers: SequenceOf[Sequence], length: int) -> dict[Sequence, Draft]:
        """Up to `length` tokens for each, written by the small model side by side."""
        begun: list[Ahead] = []
        for sequence in answers:
            text = self._shadow(sequence).text
            room = min(length, sequence.limit - sequence.new_tokens - 1, self.context - len(text.known))
            if room > 0 and self._grow(text, len(text.known) + room - 1):
                begun.append(Ahead(self._shadow(sequence), sequence, room))
        writing = begun
        while writing:
            began, count = time.perf_counter(), len(writing)
            rows = [each.row() for each in writing]
            logits_BV = self.runner.run(rows)
            for each, row in zip(writing, rows, strict=True):
                if each.tokens:
                    each.shadow.ahead += row.tokens
                    row.sequence.cached += 1
                else:
                    self._has_read(row)
            writing = self._sampled(writing, logits_BV)
            self.costs.saw(count, time.perf_counter() - began)
        for each in begun:
            each.shadow.text.cached -= len(each.shadow.ahead)
        return {each.sequence: Draft(each.tokens, each.shadow.share) for each in begun if each.tokens}

    def _sampled(self, writing: SequenceOf["Ahead"], logits_BV: Tensor) -> list["Ahead"]:
        """Add a token to each, as the engine will; those that go on."""
        open_ = [place for place, each in enumerate(writing) if each.open()]
        if not open_:
            return []
        going = [writing[place] for place in open_]
        masks = [each.allowed for each in going]
        width = min([self.model.config.vocab_size, *(len(mask) for mask in masks if mask is not None)])
        tokens = sample(
            logits_BV[:, :width],
            [each.shadow.sampling for each in going],
            [each.generator for each in going],
            [each.text() for each in going],
            [None if mask is None else mask[:width] for mask in masks],
            open_,
        )
        return [each for each, token in zip(going, tokens, strict=True) if each.push(token.id)]


class Ahead:
    """One draft in the making. Changes with every token."""

    def __init__(self, shadow: Shadow, sequence: Sequence, room: int) -> None:
        self.shadow, self.sequence, self.room = shadow, sequence, room
        self.tokens: list[int] = []
        self.matcher = None if sequence.matcher is None else sequence.matcher.copy()
        self.allowed: Tensor | None = None
        self.generator = torch.Generator()
        self.generator.set_state(sequence.generator.get_state())

    def row(self) -> Row:
        """What the answer has said since, or the last token of the draft."""
        text = self.shadow.text
        return Row(text, self.tokens[-1:] or text.known[text.cached :], 1)

    def open(self) -> bool:
        """Find out what may be said next; False where the form has become too complex to go on."""
        try:
            self.allowed = None if self.matcher is None else self.matcher.allowed()
        except UserError:
            return False
        return True

    def text(self) -> tuple[list[int], int]:
        """The text so far for whom penalties look at it, and how much of it is the prompt's."""
        known = self.sequence.known
        return (known + self.tokens if self.shadow.sampling.adjusts else known), self.sequence.prompt_tokens

    def push(self, token: int) -> bool:
        """Add a token; False where nothing may follow it."""
        self.tokens.append(token)
        if len(self.tokens) == self.room or token in self.sequence.stop_ids:
            return False
        try:
            return self.matcher is None or not self.matcher.accept(token)
        except UserError:
            return False


def check_vocabulary(tokenizer: Tokenizer, small: Tokenizer, model: Decoder, *, where: str) -> None:
    """Raise UserError where the small model's tokens are not the big one's."""
    ours, theirs = tokenizer.backend.get_vocab(), small.backend.get_vocab()
    if ours == theirs and model.config.vocab_size >= len(theirs):
        return
    wrong = next((token for token, id in ours.items() if theirs.get(token) != id), None)
    differs = f"{len(theirs)} tokens for {len(ours)}" if wrong is None else f"{wrong!r} is another token there"
    raise UserError(
        f"a model that drafts needs the very vocabulary of the one it drafts for ({differs}).",
        where=where,
        cure="Give a small model with the same tokenizer.",
    )
