"""The engine: every answer of the project is generated here, one step after another.

    add(prompt, sampling) ──► waiting ──► pages of the cache ──► running ──► events ──► pages free again
                                                     │
                          step() = schedule (who, which tokens) ─► run (the decoder) ─► commit (sample, stop, report)

Continuous batching: a step feeds the last token of every running sequence and, beside it, as much of a new one's prompt as those
who write hardly notice: some tokens, or a piece that goes through some of the layers now and through the next ones in the next
step (layered prefill, arXiv:2510.08055), which is worth its reading of weights and cache however far into a prompt it is. A
prompt whose beginning stands in the cache is read from there on. Where pages run out, the sequence that came last gives its own
back and waits; it goes on later where it was. What nobody can see ends at once: a cancelled or finished sequence gives its pages
back before the next step.

Shapes: T tokens of a prompt, D hidden size, W wanted tokens of a row, V vocabulary.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from ownlm.errors import ContextTooLong, UserError
from ownlm.generate.adapters import Adapter
from ownlm.generate.drafter import Drafter
from ownlm.generate.drafts import Draft, Source
from ownlm.generate.grammar import Grammars
from ownlm.generate.pace import Pace, Portions
from ownlm.generate.pages import PagePool, page_keys
from ownlm.generate.runners import Runner, salt
from ownlm.generate.sampling import Sampling, Token, report, sample
from ownlm.generate.sequence import Event, Row, Sequence
from ownlm.generate.speculation import Speculation
from ownlm.generate.torch_runner import torch_runner
from ownlm.models.decoder import Decoder
from ownlm.tokens.codec import Tokenizer

ECHO_LOGITS = 2**26  # of a step, at most
BLOCK, PIECE = 8, 64  # prompt tokens: that the kernels take together; of a piece that stops between layers, at most


class Engine:
    """Generates for many requests at once over the pages of one cache. For one thread; changes with every call.

    slots           answers that run at the same time; the rest waits: by priority, then the tenant with the fewest running
                    answers, then the one whose turn was longest ago; a tenant's own by deadline, then by arrival
    context         positions of a sequence, prompt and answer together; fewer where the runner's pages don't reach for so many
    prefill_tokens  prompt tokens that one step reads at most, which bounds its time and memory; by default the runner's
    runner          what computes; by default the model's own modules
    speculate       read drafts of what may come next where that pays (speculation.py); None: where the runner is exact, or with a
                    drafter
    drafter         a small model that writes such drafts
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
        drafter: Drafter | None = None,
    ) -> None:
        self.model, self.tokenizer, self.slots = model, tokenizer, slots
        self.context = min(context or model.config.max_tokens, model.config.max_tokens)
        self.runner = runner or torch_runner(model, slots=slots, context=self.context)
        self.prefill_tokens = prefill_tokens or self.runner.prefill_tokens
        self.pool = PagePool(self.runner.pages, self.runner.page_tokens)
        self.context = min(self.context, self.pool.count * self.pool.size)
        self.device = model.device
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.speculate = self.runner.exact or drafter is not None if speculate is None else speculate
        self.pace = Pace() if self.runner.exact else Portions()
        self.speculation = Speculation(drafter)
        self.underway: Row | None = None  # a piece of a prompt that is between two layers
        self.grammars = Grammars(tokenizer, model.config.vocab_size)
        self.preemptions = self.reused_tokens = 0
        self.admits = True  # False: who waits goes on waiting, for a search over beams needs the pages (beams.py)
        self.ids = itertools.count()
        self.turns: dict[str, int] = {}  # how many answers had been admitted when a tenant's last one was
        self.clock = time.monotonic

    def add(
        self,
        prompt: SequenceOf[int],
        sampling: Sampling,
        embeds_TD: Tensor | None = None,
        *,
        adapter: Adapter | None = None,
        tenant: str = "",
        priority: int = 0,
        deadline: float | None = None,
    ) -> int:
        """The id of a new request. Raises ContextTooLong or UserError, before anything runs. A form is built here, where
        `grammars` doesn't have it yet.

        embeds_TD: stands in for the embedding of the prompt's tokens, where images are among them.
        adapter: what the answer is written with, beside the base; loaded for this engine's model.
        tenant: whose it is: nothing of the cache is shared between tenants. priority: smaller goes first.
        deadline: seconds from now; an answer that isn't finished by then ends with what it has ("length"), a waiting one with
        nothing.
        """
        self.check(prompt, sampling, adapter)
        if sampling.beams > 1:
            raise UserError(
                "a search over beams has no events.", where="beams", cure="Use `Model.generate` or `answers`."
            )
        assert embeds_TD is None or len(embeds_TD) == len(prompt), f"{len(prompt)} tokens"
        limit = self.context - len(prompt) if sampling.max_tokens is None else sampling.max_tokens
        request, now = next(self.ids), self.clock()
        for index in range(sampling.answers):
            sequence = Sequence.begin(self.tokenizer, prompt, sampling, request=request, index=index, limit=limit)
            sequence.matcher = None if sampling.form is None else self.grammars.matcher(sampling.form)
            sequence.embeds_TD, sequence.adapter = embeds_TD, adapter
            sequence.tenant, sequence.priority = tenant, priority
            sequence.deadline = math.inf if deadline is None else now + deadline
            self.waiting.append(sequence)
        return request

    def check(self, prompt: SequenceOf[int], sampling: Sampling, adapter: Adapter | None = None) -> None:
        """Raise ContextTooLong with the counts, or UserError for an empty prompt, a token the model doesn't have or an adapter that
        was loaded for another runner."""
        if adapter is not None and not isinstance(adapter.weights, self.runner.adapter_form):
            raise UserError(f"the adapter {adapter.name!r} was loaded for another runner.", cure="Load it again.")
        wanted = 1 if sampling.max_tokens is None else sampling.max_tokens
        if len(prompt) + wanted > self.context:
            raise ContextTooLong(len(prompt), wanted, self.context, self.model.config.max_tokens)
        if not prompt:
            raise UserError("the prompt has no tokens.", where="prompt")
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
        late = self._late()
        rows = self._schedule()
        return late + self._commit(rows, self._run(rows)) if rows else late

    # ---- schedule

    def _late(self) -> list[Event]:
        """The ends of answers whose time is up, before they cost another step."""
        now = self.clock()
        late = [each for each in (*self.running, *self.waiting) if each.deadline <= now]
        self.waiting = [each for each in self.waiting if each.deadline > now]
        return [self._cut_short(each) for each in late]

    def _schedule(self) -> list[Row]:
        """Every writing sequence's last token, then prompt tokens within the budget: of running ones, then of waiting ones."""
        rows: list[Row] = []
        writing: list[Sequence] = []
        reading: list[Sequence] = []
        for each in sorted(self.running, key=lambda each: each.rank):
            (writing if each.writing else reading).append(each)
        # Beside a prompt the rows of drafts are no longer cheap, and the pace would blame them on it.
        drafts = self.speculation.drafts(writing) if self.speculate and not reading else {}
        for sequence in writing:
            self._add_row(rows, sequence, 1, drafts.get(sequence))
        budget = float(self.prefill_tokens)
        if rows:
            budget = min(budget, self.pace.prompt_tokens())
        piece = self._go_on(budget) if budget else None
        if piece is not None:
            budget = 0 if writing else budget - len(piece.tokens)
        for sequence in reading:
            if piece is None or sequence is not piece.sequence:
                budget -= self._read(rows, sequence, budget, whole=not writing)
        while self.admits and budget > 0 and len(self.running) < self.slots:
            following = self._next_waiting()
            if following is None or not self._admit(following):
                break
            budget -= self._read(rows, following, budget, whole=not writing)
        if piece is not None and self.underway is not None:
            rows.append(piece)  # what stops between layers comes last
        # A sequence that lost its pages to an earlier one has no row.
        return [row for row in rows if row.sequence in self.running]

    def _next_waiting(self) -> Sequence | None:
        """Who runs next. The answers to one prompt wait until the first of them has read it, and share what it read."""
        running, reading = Counter(each.tenant for each in self.running), set()
        if self.pool.size < self.context:
            reading = {each.request for each in self.running if not each.new_tokens and self._may_share(each)}
        able = [each for each in self.waiting if each.request not in reading]

        def order(each: Sequence) -> tuple[int, int, int, tuple[int, int, int]]:
            return each.priority, running[each.tenant], self.turns.get(each.tenant, -1), each.rank

        first = min(able, key=order, default=None)
        if first is None:
            return None
        # A deadline goes before one's own answers, never before those of others: everybody would have one.
        equals = [each for each in able if (each.priority, each.tenant) == (first.priority, first.tenant)]
        return min(equals, key=lambda each: (each.deadline, each.rank))

    def _admit(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run, on the pages its beginning shares; False while there are no pages for all it knows."""
        if self._may_share(sequence):
            # The last token is always computed: its logits choose the next.
            sequence.keys = page_keys(sequence.known[:-1], self.pool.size, salt(self.model, sequence))
            sequence.pages = self.pool.share(sequence.keys)
            del sequence.keys[len(sequence.pages) :]
            sequence.cached = len(sequence.pages) * self.pool.size
        if self.pool.available < -(-len(sequence.known) // self.pool.size) - len(sequence.pages):
            self._give_back(sequence)
            return False
        self.reused_tokens += sequence.cached
        self.turns[sequence.tenant] = max(self.turns.values(), default=0) + 1
        self.waiting.remove(sequence)
        self.running.append(sequence)
        return True

    def _may_share(self, sequence: Sequence) -> bool:
        """Only texts whose tokens say all of them; and an echo needs every token's logits."""
        return sequence.embeds_TD is None and not sequence.echoes

    def _read(self, rows: list[Row], sequence: Sequence, budget: float, *, whole: bool) -> float:
        """Add as many tokens of a prompt as the budget allows, or a piece of it for as many layers; what that takes of the budget."""
        left, layers = len(sequence.known) - sequence.cached, self.runner.layers
        whole = whole or left == 1  # then it is about to write
        if whole or budget >= min(left, PIECE) or layers == 1 or sequence.echoes:
            return self._add_row(rows, sequence, math.ceil(budget))
        tokens = min(left, PIECE, max(BLOCK, int(budget * layers) // BLOCK * BLOCK))
        if budget <= 0 or not self._add_row(rows, sequence, tokens):
            return 0
        self.underway = replace(rows.pop(), layers=range(0))
        piece = self._go_on(budget)
        assert piece is not None
        rows.append(piece)
        return budget

    def _go_on(self, budget: float) -> Row | None:
        """The piece that is underway, through as many further layers as the budget allows."""
        if self.underway is None:
            return None
        assert self.underway.layers is not None
        start, layers = self.underway.layers.stop, self.runner.layers
        count = max(1, int(budget * layers / len(self.underway.tokens)))
        stop = min(layers, start + count)
        wanted = self.underway.wanted if stop == layers else 0
        return replace(self.underway, layers=range(start, stop), wanted=wanted)

    def _add_row(self, rows: list[Row], sequence: Sequence, budget: int, draft: Draft | None = None) -> int:
        """Add a row of at most `budget` tokens and the draft; how many it reads: none where no page is left for it."""
        if sequence not in self.running or budget <= 0:
            return 0
        if sequence.echoes:  # all of whose logits stand in memory at once
            budget = min(budget, max(1, ECHO_LOGITS // self.model.config.vocab_size))
        tokens = sequence.known[sequence.cached : sequence.cached + budget]
        guessed, share = ([], None) if draft is None else (draft.tokens, draft.share)
        if not self._grow(sequence, sequence.cached + len(tokens) + len(guessed)):
            return 0
        completes = sequence.cached + len(tokens) == len(sequence.known)
        wanted = len(tokens) if sequence.echoes else int(completes) + len(guessed)
        rows.append(Row(sequence, [*tokens, *guessed], wanted, len(guessed), share))
        return len(tokens)

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Pages for `length` tokens, taken from those that came later where none is free; False if this one must wait itself."""
        while (lacking := -(-length // self.pool.size) - len(sequence.pages)) > 0:
            more = self.pool.take(lacking)
            if more is not None:
                sequence.pages += more
                return True
            last = max(self.running, key=lambda each: each.rank)
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to waiting; what it has written stays known and is read again when there is room."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._give_back(sequence)
        if not sequence.new_tokens:
            sequence.prompt_logprobs.clear()
        self.waiting.append(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        if self.underway is not None and self.underway.sequence is sequence:
            self.underway = None
        self.pool.release(sequence.pages)
        sequence.pages, sequence.keys, sequence.cached = [], [], 0
        self.speculation.forget(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)

    # ---- run

    def _run(self, rows: list[Row]) -> Tensor:
        """logits_WV of the rows' wanted tokens."""
        self.began = time.perf_counter()
        return self.runner.run(rows)

    # ---- commit

    def _commit(self, rows: list[Row], logits_WV: Tensor) -> list[Event]:
        """Sample for the rows whose known tokens are all read, and tell what became of each."""
        writing, reading = [row for row in rows if row.sequence.writing], self._reading(rows)
        ready: list[tuple[Row, int]] = []  # with the place of its last known token's logits
        end = 0
        for row in rows:
            sequence, begin, end = row.sequence, end, end + row.wanted
            if row.layers is not None:
                between = row.layers.stop < self.runner.layers
                self.underway = replace(self.underway, layers=row.layers) if between and self.underway else None
                if between:
                    continue
            if sequence.echoes:
                self._echo(row, logits_WV[begin:end])
            if row.completes:
                ready.append((row, end - row.drafted - 1))
            sequence.cached += row.known
            self._publish(sequence)  # before it may end, and give its pages back
        events: list[Event] = []
        for place in itertools.count():
            if not ready:
                break
            ended, allowed = self._allowed([row.sequence for row, _ in ready])
            ready = [(row, first) for row, first in ready if row.sequence in allowed]
            events += ended
            if ready:
                new, ready = self._choose(ready, place, logits_WV, allowed)
                events += new
        self._took(writing, reading, time.perf_counter() - self.began)
        return events

    def _reading(self, rows: list[Row]) -> float:
        """Prompt tokens of a step; of those that go through some of the layers, their share."""
        layers = self.runner.layers
        return sum(
            len(row.tokens) * (1 if row.layers is None else len(row.layers) / layers)
            for row in rows
            if not row.sequence.writing
        )

    def _took(self, writing: list[Row], reading: float, seconds: float) -> None:
        """After a step: what it took tells how much the next ones can bear."""
        self.pace.saw(sum(len(row.tokens) for row in writing), reading, seconds)
        if self.speculate and not reading:
            drafted: dict[Source, int] = {}
            for row in writing:
                if row.share is not None:
                    drafted[row.share.source] = drafted.get(row.share.source, 0) + row.drafted
            self.speculation.ran(len(writing), drafted, seconds)

    def _choose(
        self, ready: list[tuple[Row, int]], place: int, logits_WV: Tensor, allowed: dict[Sequence, Tensor | None]
    ) -> tuple[list[Event], list[tuple[Row, int]]]:
        """A token for each at this place of its draft; and those rows whose draft foretold it, for the next place."""
        sequences = [row.sequence for row, _ in ready]
        tokens = sample(
            logits_WV,
            [sequence.sampling for sequence in sequences],
            [sequence.generator for sequence in sequences],
            [(sequence.known, sequence.prompt_tokens) for sequence in sequences],
            [allowed[sequence] for sequence in sequences],
            [first + place for _, first in ready],
        )
        events, foretold = [], []
        for (row, first), token in zip(ready, tokens, strict=True):
            event = self._advance(row.sequence, token)
            events.append(event)
            came_true = place < row.drafted and token.id == row.tokens[row.known + place]
            if came_true and not event.finish_reason:
                row.sequence.cached += 1  # its key and value stand there already
                foretold.append((row, first))
            elif row.share is not None:
                row.share.learn(row.drafted, place + came_true)
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
        if sequence in self.running:
            self._release(sequence)
        return Event(sequence.request, sequence.index, None, sequence.characters, text, "length")

    def _publish(self, sequence: Sequence) -> None:
        """Offer the pages that are full by now to those who begin alike."""
        if sequence.cached // self.pool.size > len(sequence.keys) and sequence.embeds_TD is None:
            read = sequence.known[: sequence.cached]
            sequence.keys = self.pool.offer(read, sequence.pages, sequence.keys, salt(self.model, sequence))

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
