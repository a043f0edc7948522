"""The engine: every answer of the project is generated here, one step after another.

    add(prompt, sampling) ──► waiting ──► pages of the cache ──► running ──► events ──► pages free again
                                                     │
                          step() = schedule (who, which tokens) ─► run (the decoder) ─► commit (sample, stop, report)

Continuous batching: a step feeds the last token of every running sequence and, beside it, a bounded number of prompt tokens of
new ones: so few that those who write hardly notice. A prompt whose beginning stands in the cache is read from there on. Where
pages run out, the sequence that came last gives its own back and waits; it goes on later where it was. What nobody can see
ends at once: a cancelled or finished sequence gives its pages back before the next step.

Shapes: T tokens of a prompt, D hidden size, W wanted tokens of a row, V vocabulary.
"""

import itertools
import time
from collections import Counter
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from ownlm.errors import ContextTooLong, UserError
from ownlm.generate.drafts import Costs
from ownlm.generate.grammar import Grammars
from ownlm.generate.pages import PagePool, page_keys
from ownlm.generate.runners import Runner, TorchRunner
from ownlm.generate.sampling import Sampling, Token, report, sample
from ownlm.generate.sequence import Event, Row, Sequence
from ownlm.generate.text import StopText
from ownlm.models.decoder import Decoder
from ownlm.models.rotary import is_long
from ownlm.tokens.codec import Tokenizer


class Engine:
    """Generates for many requests at once over the pages of one cache. For one thread; changes with every call.

    slots           answers that run at the same time; the rest waits: by priority, then the tenant with the fewest running
                    answers, then by arrival
    context         positions of a sequence: prompt and answer together
    prefill_tokens  prompt tokens that one step reads at most, which bounds its time and memory; by default the runner's
    runner          what computes; by default the model's own modules
    speculate       read drafts of what may come next where that pays (drafts.py); None: where the runner is exact
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        slots: int = 16,
        context: int | None = None,
        prefill_tokens: int | None = None,
        runner: Runner | None = None,
        speculate: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.context = min(context or model.config.max_tokens, model.config.max_tokens)
        self.runner = runner or TorchRunner(model, slots=slots, context=self.context)
        self.prefill_tokens = prefill_tokens or self.runner.prefill_tokens
        self.pool = PagePool(self.runner.pages, self.runner.page_tokens)
        assert self.pool.count * self.pool.size >= self.context, "a single answer must fit"
        self.device = model.device
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.speculate = self.runner.exact if speculate is None else speculate
        self.pace, self.costs = Pace(), Costs()
        self.drafted_tokens = self.accepted_tokens = 0
        self.grammars = Grammars(tokenizer, model.config.vocab_size)
        self.preemptions = self.reused_tokens = 0
        self.ids = itertools.count()

    def add(
        self,
        prompt: SequenceOf[int],
        sampling: Sampling,
        embeds_TD: Tensor | None = None,
        *,
        tenant: str = "",
        priority: int = 0,
    ) -> int:
        """The id of a new request. Raises ContextTooLong or UserError, before anything runs. A form is built here, where
        `grammars` doesn't have it yet.

        embeds_TD: stands in for the embedding of the prompt's tokens, where images are among them.
        tenant: whose it is: nothing of the cache is shared between tenants. priority: smaller goes first.
        """
        self.check(prompt, sampling)
        assert embeds_TD is None or len(embeds_TD) == len(prompt), f"{len(prompt)} tokens"
        room = self.context - len(prompt)
        stop_ids = frozenset(self.tokenizer.stop_ids) if sampling.stop_ids is None else sampling.stop_ids
        request = next(self.ids)
        self.waiting.extend(
            Sequence(
                request=request,
                index=index,
                prompt_tokens=len(prompt),
                known=list(prompt),
                sampling=sampling,
                limit=room if sampling.max_tokens is None else sampling.max_tokens,
                stop_ids=stop_ids,
                generator=sampling.generator(index),
                decode=self.tokenizer.decode_stream(),
                stop_text=StopText(sampling.stop),
                matcher=None if sampling.form is None else self.grammars.matcher(sampling.form),
                embeds_TD=embeds_TD,
                tenant=tenant,
                priority=priority,
            )
            for index in range(sampling.n)
        )
        return request

    def check(self, prompt: SequenceOf[int], sampling: Sampling) -> None:
        """Raise ContextTooLong with the counts, or UserError for an empty prompt or a token the model doesn't have."""
        wanted = 1 if sampling.max_tokens is None else sampling.max_tokens
        if len(prompt) + wanted > self.context:
            raise ContextTooLong(len(prompt), wanted, self.context)
        if not prompt:
            raise UserError("the prompt has no tokens.", where="prompt")
        if sampling.beams > 1:
            raise UserError("only encoder-decoders search over beams.", where="beams", cure="Leave beams out.")
        vocab_size = self.model.config.vocab_size
        wrong = next((id for id in prompt if not 0 <= id < vocab_size), None)
        if wrong is not None:
            raise UserError(f"{wrong} is not a token of this model (0 to {vocab_size - 1}).", where="prompt")
        wrong = next((id for id, _ in sampling.logit_bias if not 0 <= id < vocab_size), None)
        if wrong is not None:
            raise UserError(f"{wrong} is not a token of this model (0 to {vocab_size - 1}).", where="logit_bias")

    def cancel(self, request: int) -> None:
        """Drop all answers of a request; their pages are free at once. Unknown and finished requests are no error."""
        self.waiting = [sequence for sequence in self.waiting if sequence.request != request]
        for sequence in [sequence for sequence in self.running if sequence.request == request]:
            self._release(sequence)

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def cache_usage(self) -> float:
        """The share of the cache's pages that are in use, between 0 and 1."""
        return self.pool.usage

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """The events of one step: a new token per running answer, or several where a draft came true."""
        rows = self._schedule()
        logits = self._run(rows)
        return self._commit(rows, logits)

    # ---- schedule

    def _schedule(self) -> list[Row]:
        """Every writing sequence's last token, then prompt tokens within the budget: of running ones, then of waiting ones."""
        rows: list[Row] = []
        writing = sorted((each for each in self.running if each.writing), key=lambda each: each.rank)
        for sequence in writing:
            self._add_row(rows, sequence, 1, self._draft(sequence, len(writing)))
        budget = self.prefill_tokens
        if rows and self.runner.exact:
            budget = min(budget, self.pace.prompt_tokens())
        for sequence in sorted((each for each in self.running if not each.writing), key=lambda each: each.rank):
            budget -= self._add_row(rows, sequence, budget)
        while budget > 0 and len(self.running) < self.slots:
            following = self._next_waiting()
            if following is None or not self._admit(following):
                break
            budget -= self._add_row(rows, following, budget)
        # A sequence that lost its pages to an earlier one has no row.
        return [row for row in rows if row.sequence in self.running]

    def _next_waiting(self) -> Sequence | None:
        """Who runs next. The answers to one prompt wait until the first of them has read it, and share what it read."""
        running, reading = Counter(each.tenant for each in self.running), set()
        if self.pool.size < self.context:
            reading = {each.request for each in self.running if not each.new_tokens and self._may_share(each)}
        able = [each for each in self.waiting if each.request not in reading]
        return min(able, key=lambda each: (each.priority, running[each.tenant], each.rank), default=None)

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run, on the pages its beginning shares; False while there are no pages for all it knows."""
        if self._may_share(sequence):
            # The last token is always computed: its logits choose the next.
            sequence.keys = page_keys(sequence.known[:-1], self.pool.size, self._salt(sequence))
            sequence.pages = self.pool.share(sequence.keys)
            del sequence.keys[len(sequence.pages) :]
            sequence.cached = len(sequence.pages) * self.pool.size
        if self.pool.available < -(-len(sequence.known) // self.pool.size) - len(sequence.pages):
            self._give_back(sequence)
            return False
        self.reused_tokens += sequence.cached
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _may_share(self, sequence: Sequence) -> bool:
        """Only texts whose tokens say all of them; and an echo needs every token's logits."""
        return sequence.embeds_TD is None and not sequence.echoes

    def _salt(self, sequence: Sequence) -> bytes:
        """What must be equal besides the tokens: the tenant, and how positions turn in a text of this length."""
        long = any(is_long(layer.rotary, len(sequence.known)) for layer in self.model.config.layers if layer.rotary)
        return f"{int(long)}{sequence.tenant}".encode()

    def _draft(self, sequence: Sequence, rows: int) -> list[int]:
        """What this answer may say next, no longer than it may become."""
        room = sequence.limit - sequence.new_tokens - 1
        length = self.costs.length(rows, sequence.said.share) if self.speculate else 0
        return sequence.said.find(sequence.known, min(length, room)) if length and room > 0 else []

    def _add_row(self, rows: list[Row], sequence: Sequence, budget: int, draft: SequenceOf[int] = ()) -> int:
        """Add a row of at most `budget` tokens and the draft; how many it reads: none where no page is left for it."""
        if sequence not in self.running or budget <= 0:
            return 0
        tokens = sequence.known[sequence.cached : sequence.cached + budget]
        if not self._grow(sequence, sequence.cached + len(tokens) + len(draft)):
            return 0
        completes = sequence.cached + len(tokens) == len(sequence.known)
        wanted = len(tokens) if sequence.echoes else int(completes) + len(draft)
        rows.append(Row(sequence, [*tokens, *draft], wanted, len(draft)))
        return len(tokens)

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Pages for `length` tokens, taken from those that came later where none is free; False if this one must wait itself."""
        while True:
            more = self.pool.take(max(0, -(-length // self.pool.size) - len(sequence.pages)))
            if more is not None:
                sequence.pages += more
                return True
            last = max(self.running, key=lambda each: each.rank)
            self._preempt(last)
            if last is sequence:
                return False

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting; what it has written stays known and is read again when there is room."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        if not sequence.new_tokens:
            sequence.prompt_logprobs.clear()
        self.waiting.append(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.keys, sequence.cached = [], [], 0

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)

    # ---- run

    def _run(self, rows: list[Row]) -> list[Tensor]:
        """logits_WV of each row's wanted tokens."""
        if not rows:
            return []
        began = time.perf_counter()
        logits = self.runner.run(rows)
        seconds = time.perf_counter() - began
        writing = sum(len(row.tokens) for row in rows if row.sequence.writing)
        reading = sum(len(row.tokens) for row in rows if not row.sequence.writing)
        self.pace.saw(writing, reading, seconds)
        if not reading:
            self.costs.saw(writing, seconds)
        return logits

    # ---- commit

    def _commit(self, rows: list[Row], logits: list[Tensor]) -> list[Event]:
        """Sample for the rows whose known tokens are all read, and tell what became of each."""
        ready: list[tuple[Row, Tensor]] = []
        for row, logits_WV in zip(rows, logits, strict=True):
            sequence = row.sequence
            if sequence.echoes:
                self._echo(row, logits_WV)
            if row.completes:
                ready.append((row, logits_WV[-row.drafted - 1 :]))
            sequence.cached += row.known
            self._publish(sequence)  # before it may end, and give its pages back
        events: list[Event] = []
        for place in itertools.count():
            if not ready:
                break
            ended, allowed = self._allowed([row.sequence for row, _ in ready])
            ready = [(row, logits_WV) for row, logits_WV in ready if row.sequence in allowed]
            events += ended
            if ready:
                new, ready = self._choose(ready, place, allowed)
                events += new
        return events

    def _choose(
        self, ready: list[tuple[Row, Tensor]], place: int, allowed: dict[Sequence, Tensor | None]
    ) -> tuple[list[Event], list[tuple[Row, Tensor]]]:
        """A token for each at this place of its draft; and those rows whose draft foretold it, for the next place."""
        sequences = [row.sequence for row, _ in ready]
        tokens = sample(
            torch.stack([logits_WV[place] for _, logits_WV in ready]),
            [sequence.sampling for sequence in sequences],
            [sequence.generator for sequence in sequences],
            [(sequence.known, sequence.prompt_tokens) for sequence in sequences],
            [allowed[sequence] for sequence in sequences],
        )
        events, foretold = [], []
        for (row, logits_WV), token in zip(ready, tokens, strict=True):
            event = self._advance(row.sequence, token)
            events.append(event)
            came_true = place < row.drafted and token.id == row.tokens[row.known + place]
            if came_true and not event.finish_reason:
                row.sequence.cached += 1  # its key and value stand there already
                foretold.append((row, logits_WV))
            elif row.drafted:
                accepted = place + came_true
                row.sequence.said.learn(row.drafted, accepted)
                self.drafted_tokens += row.drafted
                self.accepted_tokens += accepted
        return events, foretold

    def _allowed(self, sequences: SequenceOf[Sequence]) -> tuple[list[Event], dict[Sequence, Tensor | None]]:
        """What each may choose from; and the ends of those whose form has become too complex to go on."""
        events: list[Event] = []
        allowed: dict[Sequence, Tensor | None] = {}
        for sequence in sequences:
            try:
                allowed[sequence] = None if sequence.matcher is None else sequence.matcher.allowed()
            except UserError:
                events.append(self._cut_short(sequence))
        return events, allowed

    def _cut_short(self, sequence: Sequence) -> Event:
        text = sequence.stop_text.push(sequence.decode.finish()) + sequence.stop_text.flush()
        self._release(sequence)
        return Event(sequence.request, sequence.index, None, sequence.characters, text, "length")

    def _publish(self, sequence: Sequence) -> None:
        """Offer the pages that are full by now to those who begin alike."""
        full = sequence.cached // self.pool.size
        if full > len(sequence.keys) and sequence.embeds_TD is None:
            sequence.keys = page_keys(
                sequence.known[: full * self.pool.size], self.pool.size, self._salt(sequence), sequence.keys
            )
            for page, key in zip(sequence.pages, sequence.keys, strict=False):
                self.pool.publish(page, key)

    def _echo(self, row: Row, logits_WV: Tensor) -> None:
        """Add the log-probabilities of the prompt tokens that follow this row's tokens."""
        sequence = row.sequence
        if not sequence.cached:
            sequence.prompt_logprobs.append(Token(sequence.known[0], None))
        targets = sequence.known[sequence.cached + 1 : sequence.cached + 1 + len(row.tokens)]
        if targets:
            ids_T = torch.tensor(targets, device=logits_WV.device)
            sequence.prompt_logprobs += report(
                logits_WV[: len(targets)], ids_T, [sequence.sampling.logprobs] * len(targets)
            )

    def _advance(self, sequence: Sequence, token: Token) -> Event:
        """Append the token to the answer, end it where it must end, and tell what is new."""
        prompt = () if sequence.new_tokens else tuple(sequence.prompt_logprobs)
        if not sequence.limit:
            self._release(sequence)
            return Event(sequence.request, sequence.index, None, 0, "", "length", prompt)
        event = sequence.push(token, prompt)
        if event.finish_reason:
            self._release(sequence)
        return event


class Pace:
    """How long steps take here, from those seen: so that a prompt is let in without holding up those who write."""

    LEAST, BLOCK, UNKNOWN = 2, 8, 16  # prompt tokens a step; within a block of rows the weights are read once
    SLOWER = 0.7  # how much longer a step of writing may take for a prompt's sake

    def __init__(self) -> None:
        self.step_seconds = self.token_seconds = 0.0

    def saw(self, writing: int, reading: int, seconds: float) -> None:
        if not reading:
            self.step_seconds = _blend(self.step_seconds, seconds)
        else:
            rest = seconds - (self.step_seconds if writing else 0.0)
            self.token_seconds = _blend(self.token_seconds, max(rest / reading, seconds / (writing + reading) / 4))

    def prompt_tokens(self) -> int:
        """How many a step may read beside those who write."""
        if not self.step_seconds or not self.token_seconds:
            return self.UNKNOWN
        tokens = int(self.SLOWER * self.step_seconds / self.token_seconds)
        return max(self.LEAST, tokens if tokens < self.BLOCK else tokens // self.BLOCK * self.BLOCK)


def _blend(before: float, new: float) -> float:
    return new if not before else 0.8 * before + 0.2 * new
