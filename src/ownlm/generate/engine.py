"""The engine: every answer of the project is generated here, one step after another.

    add(prompt, sampling) ──► waiting ──► a free slot of the KV cache ──► running ──► events ──► slot free again
                                                        │
                          step() = schedule (who, which tokens) ─► run (the decoder) ─► commit (sample, stop, report)

Continuous batching: a step feeds the last token of every running sequence and, beside it, a bounded number of prompt tokens
of new ones, so a long prompt is read in chunks while others go on writing. A cancelled or finished sequence gives its slot
back at once; what it left in the cache is never attended to, for attention looks at positions before its own only.

Shapes: B rows, T tokens of a row, D hidden size, V vocabulary.
"""

import heapq
import itertools
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ownlm.errors import ContextTooLong, UserError
from ownlm.generate.sampling import Sampling, Token, report, sample
from ownlm.generate.text import StopText
from ownlm.models.cache import KVCache
from ownlm.models.decoder import Decoder
from ownlm.records import FinishReason
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.stream import DecodeStream


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did for one answer.

    request, index  whose answer: the id `add` gave, and which of its `n`
    token           the token just sampled; None when `max_tokens` is 0
    start           characters of the answer before this token's text (a token belongs to the visible answer when its start
                    lies before the end of all text shown)
    text            what may be shown now; it can lag behind the tokens by half a character or half a stop string
    finish_reason   set in the last event of an answer
    prompt          with `echo`, in the first event: the prompt's tokens
    """

    request: int
    index: int
    token: Token | None
    start: int
    text: str
    finish_reason: FinishReason | None
    prompt: tuple[Token, ...] = ()


@dataclass(slots=True)
class Sequence:
    """An answer in the making. Changes with every step."""

    request: int
    index: int
    prompt: list[int]
    sampling: Sampling
    limit: int  # new tokens at most
    stop_ids: frozenset[int]
    generator: torch.Generator
    decode: DecodeStream
    stop_text: StopText
    embeds_TD: Tensor | None = None  # stands in for the embedding of the prompt
    slot: int = -1
    cached: int = 0  # tokens whose keys and values are in the cache
    tokens: list[int] = field(default_factory=list)
    characters: int = 0
    prompt_logprobs: list[Token] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one sequence to run now; the first of them stands at position `sequence.cached`."""

    sequence: Sequence
    tokens: list[int]
    phase: Literal["prefill", "decode"]

    @property
    def completes_prompt(self) -> bool:
        """True when the last token's logits choose a new token."""
        return self.sequence.cached + len(self.tokens) >= len(self.sequence.prompt)


class Engine:
    """Generates for many requests at once over the `slots` of one KV cache. For one thread; changes with every call.

    slots           answers that run at the same time; the rest waits in order of arrival
    context         positions of a slot: prompt and answer together
    prefill_tokens  prompt tokens (with padding) that one step reads at most, which bounds its time and memory
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        slots: int = 16,
        context: int | None = None,
        prefill_tokens: int = 4096,
    ) -> None:
        self.model, self.tokenizer, self.slots, self.prefill_tokens = model, tokenizer, slots, prefill_tokens
        self.context = min(context or model.config.max_tokens, model.config.max_tokens)
        weight = model.head_weight
        self.device = weight.device
        self.cache = KVCache(
            model.config, slots=slots, max_tokens=self.context, dtype=weight.dtype, device=weight.device
        )
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.free = list(range(slots))  # a heap: the lowest slot first, so that running slots stay neighbours
        self.ids = itertools.count()

    def add(self, prompt: SequenceOf[int], sampling: Sampling, embeds_TD: Tensor | None = None) -> int:
        """The id of a new request. Raises ContextTooLong or UserError, before anything runs.

        embeds_TD: stands in for the embedding of the prompt's tokens, where images are among them.
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
                prompt=list(prompt),
                sampling=sampling,
                limit=room if sampling.max_tokens is None else sampling.max_tokens,
                stop_ids=stop_ids,
                generator=sampling.generator(index),
                decode=self.tokenizer.decode_stream(),
                stop_text=StopText(sampling.stop),
                embeds_TD=embeds_TD,
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

    def cancel(self, request: int) -> None:
        """Drop all answers of a request; their slots are free at once. Unknown and finished requests are no error."""
        self.waiting = deque(sequence for sequence in self.waiting if sequence.request != request)
        for sequence in [sequence for sequence in self.running if sequence.request == request]:
            self._release(sequence)

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def cache_usage(self) -> float:
        """The share of the cache's positions that hold a token, between 0 and 1."""
        return sum(sequence.cached for sequence in self.running) / (self.slots * self.context)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """The events of one step: at most one new token per running answer."""
        rows = self._schedule()
        hidden = self._run(rows)
        return self._commit(rows, hidden)

    def _schedule(self) -> list[Row]:
        """Fill free slots; then every running sequence's last token, and prompt tokens within the budget."""
        while self.waiting and self.free:
            sequence = self.waiting.popleft()
            sequence.slot = heapq.heappop(self.free)
            self.running.append(sequence)
        rows: list[Row] = []
        width = count = 0
        for sequence in self.running:
            if sequence.cached >= len(sequence.prompt):
                rows.append(Row(sequence, sequence.tokens[-1:], "decode"))
                continue
            chunk = sequence.prompt[sequence.cached : sequence.cached + self.prefill_tokens]
            # Rows are padded to the widest. The first always fits, so the oldest prompt never starves.
            if count and (count + 1) * max(width, len(chunk)) > self.prefill_tokens:
                continue
            rows.append(Row(sequence, chunk, "prefill"))
            width, count = max(width, len(chunk)), count + 1
        return rows

    def _run(self, rows: list[Row]) -> list[Tensor]:
        """The hidden states, (T, D), of each row's tokens."""
        hidden: dict[int, Tensor] = {}
        for phase in ("prefill", "decode"):
            chosen = [index for index, row in enumerate(rows) if row.phase == phase]
            # The cache reads neighbouring slots without a copy.
            chosen.sort(key=lambda index: rows[index].sequence.slot)
            if chosen:
                hidden.update(zip(chosen, self._forward([rows[index] for index in chosen]), strict=True))
        return [hidden[index] for index in range(len(rows))]

    def _forward(self, rows: list[Row]) -> list[Tensor]:
        width = max(len(row.tokens) for row in rows)
        padding = [width - len(row.tokens) for row in rows]
        tokens = [row.tokens + [0] * pad for row, pad in zip(rows, padding, strict=True)]
        # Position -1 is padding: the cache doesn't keep it and nobody sees it.
        positions = [
            [*range(row.sequence.cached, row.sequence.cached + len(row.tokens)), *[-1] * pad]
            for row, pad in zip(rows, padding, strict=True)
        ]
        slots = [row.sequence.slot for row in rows]
        tokens_BT = torch.tensor(tokens, device=self.device)
        hidden_BTD = self.model(
            tokens_BT,
            positions_BT=torch.tensor(positions, device=self.device),
            cache=self.cache,
            slots=torch.tensor(slots, device=self.device),
            embeds_BTD=self._embeds(rows, tokens_BT),
        )
        return [hidden_BTD[index, : len(row.tokens)] for index, row in enumerate(rows)]

    def _embeds(self, rows: list[Row], tokens_BT: Tensor) -> Tensor | None:
        """The vectors of these tokens, where some of a prompt's come from images."""
        given = {
            index: row.sequence.embeds_TD[row.sequence.cached :][: len(row.tokens)]
            for index, row in enumerate(rows)
            if row.phase == "prefill" and row.sequence.embeds_TD is not None
        }
        if not given:
            return None
        embeds_BTD = self.model.embed(tokens_BT).clone()
        for index, embeds_TD in given.items():
            embeds_BTD[index, : len(embeds_TD)] = embeds_TD
        return embeds_BTD

    def _commit(self, rows: list[Row], hidden: list[Tensor]) -> list[Event]:
        """Sample for the rows whose prompt is read, and tell what became of each."""
        for row, hidden_TD in zip(rows, hidden, strict=True):
            if row.sequence.sampling.echo and row.phase == "prefill":
                self._echo(row, hidden_TD)
        ready = [(row, states[-1]) for row, states in zip(rows, hidden, strict=True) if row.completes_prompt]
        for row in rows:
            row.sequence.cached += len(row.tokens)
        if not ready:
            return []
        sequences = [row.sequence for row, _ in ready]
        logits_BV = self.model.logits(torch.stack([state_D for _, state_D in ready])).float()
        tokens = sample(
            logits_BV, [sequence.sampling for sequence in sequences], [sequence.generator for sequence in sequences]
        )
        return [self._advance(sequence, token) for sequence, token in zip(sequences, tokens, strict=True)]

    def _echo(self, row: Row, hidden_TD: Tensor) -> None:
        """Add the log-probabilities of the prompt tokens that follow this chunk's tokens."""
        sequence = row.sequence
        if not sequence.cached:
            sequence.prompt_logprobs.append(Token(sequence.prompt[0], None))
        targets = sequence.prompt[sequence.cached + 1 : sequence.cached + 1 + len(row.tokens)]
        if targets:
            logits_TV = self.model.logits(hidden_TD[: len(targets)]).float()
            ids_T = torch.tensor(targets, device=self.device)
            sequence.prompt_logprobs += report(logits_TV, ids_T, [sequence.sampling.logprobs] * len(targets))

    def _advance(self, sequence: Sequence, token: Token) -> Event:
        """Append the token to the answer, end it where it must end, and tell what is new."""
        prompt = () if sequence.tokens else tuple(sequence.prompt_logprobs)
        if not sequence.limit:
            self._release(sequence)
            return Event(sequence.request, sequence.index, None, 0, "", "length", prompt)
        event = advance(sequence, token, prompt)
        if event.finish_reason:
            self._release(sequence)
        return event

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        heapq.heappush(self.free, sequence.slot)


def advance(sequence: Sequence, token: Token, prompt: tuple[Token, ...] = ()) -> Event:
    """What the next token of an answer does to it: the text it shows, and whether it is the last."""
    sequence.tokens.append(token.id)
    start, ended = sequence.characters, token.id in sequence.stop_ids
    full = len(sequence.tokens) == sequence.limit
    piece = "" if ended else sequence.decode.push(token.id)
    if ended or full:
        piece += sequence.decode.finish()
    sequence.characters += len(piece)
    text = sequence.stop_text.push(piece)
    finish: FinishReason | None = None
    if sequence.stop_text.stopped:
        finish = "stop"
    elif ended or full:
        text += sequence.stop_text.flush()
        finish = "stop" if ended else "length"
    return Event(sequence.request, sequence.index, token, start, text, finish, prompt)
