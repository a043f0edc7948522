"""An answer in the making, the rows it sends through the model, and what each step tells of it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ownlm.generate.drafts import Share
from ownlm.generate.grammar import Matcher
from ownlm.generate.sampling import Sampling, Token
from ownlm.generate.text import StopText
from ownlm.records import FinishReason
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.stream import DecodeStream

if TYPE_CHECKING:
    from ownlm.generate.adapters import Adapter


@dataclass(frozen=True, slots=True)
class Event:
    """What one step did for one answer.

    request, index  whose answer: the id `add` gave, and which of those that are written
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


@dataclass(slots=True, eq=False)
class Sequence:
    """An answer in the making. Changes with every step. `known` is the prompt and the answer so far; the keys and values of
    its first `cached` tokens stand in `pages`."""

    request: int
    index: int
    prompt_tokens: int
    known: list[int]
    sampling: Sampling
    limit: int  # new tokens at most
    stop_ids: frozenset[int]
    generator: torch.Generator
    decode: DecodeStream
    stop_text: StopText
    matcher: Matcher | None = None  # where it stands in the form it must have
    embeds_TD: Tensor | None = None  # stands in for the embedding of the prompt
    adapter: "Adapter | None" = None
    tenant: str = ""
    priority: int = 0
    deadline: float = math.inf  # by the engine's clock
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the full pages
    cached: int = 0
    characters: int = 0
    prompt_logprobs: list[Token] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        tokenizer: Tokenizer,
        prompt: Iterable[int],
        sampling: Sampling,
        *,
        request: int,
        limit: int,
        index: int = 0,
    ) -> "Sequence":
        """Answer `index` to a prompt, of at most `limit` tokens, before its first step."""
        known = list(prompt)
        return cls(
            request=request,
            index=index,
            prompt_tokens=len(known),
            known=known,
            sampling=sampling,
            limit=limit,
            stop_ids=sampling.stops(tokenizer.stop_ids),
            generator=sampling.generator(index),
            decode=tokenizer.decode_stream(),
            stop_text=StopText(sampling.stop),
        )

    @property
    def rank(self) -> tuple[int, int, int]:
        """Who goes first: by priority, then by arrival."""
        return self.priority, self.request, self.index

    @property
    def new_tokens(self) -> int:
        return len(self.known) - self.prompt_tokens

    @property
    def writing(self) -> bool:
        """True when only the last token has yet to be read."""
        return self.new_tokens > 0 and self.cached == len(self.known) - 1

    @property
    def echoes(self) -> bool:
        """True while the log-probabilities of the prompt are still to be told."""
        return self.sampling.echo and not self.new_tokens

    def push(self, token: Token, prompt: tuple[Token, ...] = ()) -> Event:
        """What the next token of the answer does to it: the text it shows, and whether it is the last."""
        self.known.append(token.id)
        start, ended = self.characters, token.id in self.stop_ids
        complete = not ended and self.matcher is not None and self.matcher.accept(token.id)
        full = complete or self.new_tokens == self.limit
        piece = "" if ended else self.decode.push(token.id)
        if ended or full:
            piece += self.decode.finish()
        self.characters += len(piece)
        text = self.stop_text.push(piece)
        finish: FinishReason | None = None
        if self.stop_text.stopped:
            finish = "stop"
        elif ended or full:
            text += self.stop_text.flush()
            finish = "stop" if ended or complete else "length"
        return Event(self.request, self.index, token, start, text, finish, prompt)


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens of one sequence to run now; the first stands at position `sequence.cached`. The logits of the last `wanted` are
    asked for. The last `drafted` of them are guesses of what comes next, and `share` is told how many were right. `layers`: those they
    go through in this step; None: all."""

    sequence: Sequence
    tokens: list[int]
    wanted: int
    drafted: int = 0
    share: Share | None = None
    layers: range | None = None

    @property
    def known(self) -> int:
        """How many of the tokens are known and not guessed."""
        return len(self.tokens) - self.drafted

    @property
    def embeds_TD(self) -> Tensor | None:
        """What stands in for the embedding of its first tokens, where some of a prompt's come from images."""
        whole_TD, start = self.sequence.embeds_TD, self.sequence.cached
        return None if whole_TD is None or start >= len(whole_TD) else whole_TD[start : start + len(self.tokens)]

    @property
    def completes(self) -> bool:
        """True when the last known token's logits choose a new token."""
        return self.sequence.cached + self.known == len(self.sequence.known)
