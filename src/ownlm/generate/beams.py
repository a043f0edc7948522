"""Search over beams: several answers are kept side by side while the likeliest is looked for.

    continuations of the open answers, likeliest first ─► Search.take ─┬─ those that end are complete
                                                                       └─ the first `beams` others stay open

At every step the likeliest continuations of a prompt's open answers are taken in order: those that end are complete if they are
among the first `beams`, and the first `beams` that don't end stay open. An answer is worth the sum of its log-probabilities divided
by a power of its length. `Search` is that rule; encoder-decoders (seq2seq.py) and decoders (here) bring the numbers.

The beams of a decoder share the pages of what they have in common, the prompt first of all. Where two go on from one, the full pages
are shared and the last one is copied.

Shapes: B rows (open answers of all searches), V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.generate.engine import BLOCK, Engine
from ownlm.generate.sampling import Sampling, Token
from ownlm.generate.sequence import Event, Row
from ownlm.generate.sequence import Sequence as Text
from ownlm.records import Completion
from ownlm.tokens.codec import Tokenizer

Candidate = tuple[int, int, float, float]  # which open answer, the next token, its log-probability, the new sum


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer in the making: its tokens, their log-probabilities and the sum of those; `ended` by a stop token."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    ended: bool = False

    def completion(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> Completion:
        return Completion(
            text=tokenizer.decode(self.tokens[:-1] if self.ended else self.tokens),
            tokens=self.tokens,
            logprobs=self.logprobs,
            finish_reason="stop" if self.ended else "length",
            prompt_tokens=len(prompt),
        )


@dataclass(slots=True, eq=False)
class Search:
    """The search for the likeliest answers to one prompt, of at most `limit` tokens. Changes with every step."""

    sampling: Sampling
    limit: int
    stop_ids: frozenset[int]
    open: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    complete: list[tuple[float, Hypothesis]] = field(default_factory=list)  # what each is worth; best first

    @property
    def width(self) -> int:
        """Of how many candidates `beams` don't end, whatever the others do."""
        return max(2, 1 + len(self.stop_ids)) * self.sampling.beams

    def take(self, candidates: Sequence[Candidate]) -> list[int]:
        """Go on by a step; which answers those that are open now go on from, none where the search is over."""
        count, length = self.sampling.beams, len(self.open[0].tokens) + 1
        kept: list[tuple[int, Hypothesis]] = []
        for rank, (parent, token, logprob, total) in enumerate(candidates):
            before = self.open[parent]
            ended = token in self.stop_ids
            new = Hypothesis((*before.tokens, token), (*before.logprobs, logprob), total, ended)
            if ended or length == self.limit:
                if rank < count:
                    self.complete.append((_worth(self.sampling, total, length), new))
            elif len(kept) < count:
                kept.append((parent, new))
        self.complete = sorted(self.complete, key=lambda scored: -scored[0])[:count]
        if not kept or not self._goes_on(kept[0][1].total, length):
            return []
        self.open = [answer for _, answer in kept]
        return [parent for parent, _ in kept]

    def _goes_on(self, best: float, length: int) -> bool:
        """Whether an open answer may still be worth more than the worst complete one; `best` is the sum of the likeliest."""
        if len(self.complete) < self.sampling.beams:
            return True
        if self.sampling.early_stopping is True:
            return False
        patient = self.sampling.early_stopping == "never" and self.sampling.length_penalty > 0
        return _worth(self.sampling, best, self.limit if patient else length) > self.complete[-1][0]


def _worth(sampling: Sampling, total: float, length: int) -> float:
    return total / float(length**sampling.length_penalty)


def continuations(logprobs_BV: Tensor, searches: Sequence[Search]) -> Iterator[list[Candidate]]:
    """The likeliest candidates of each search, best first. The rows are those of the searches' open answers, as many for each."""
    count, vocab_size = len(searches[0].open), logprobs_BV.shape[-1]
    totals = torch.tensor([[answer.total for answer in each.open] for each in searches], device=logprobs_BV.device)
    own = logprobs_BV.view(-1, count, vocab_size)
    best = (own + totals[:, :, None]).flatten(1).topk(min(searches[0].width, count * vocab_size))
    own_logprobs = own.flatten(1).gather(1, best.indices)
    for sums, places, logprobs in zip(best.values.tolist(), best.indices.tolist(), own_logprobs.tolist(), strict=True):
        yield [
            (place // vocab_size, place % vocab_size, logprob, total)
            for place, logprob, total in zip(places, logprobs, sums, strict=True)
        ]


# ---- decoders


@dataclass(slots=True, eq=False)
class Group:
    """The beams of one prompt: `texts` are the open answers over their pages, all of them read as far; `need`: the pages that it takes
    at most."""

    search: Search
    texts: list[Text]
    need: int

    @property
    def owed(self) -> int:
        """How many pages it may still take."""
        return self.need - len({page for text in self.texts for page in text.pages})


class Searches:
    """Searches over beams on the pages of an engine, beside what else it does. For the engine's thread; changes with every call.

    A search begins when the pages that it takes at most are there; they are promised to it. While one waits for them, the engine
    admits nobody else.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.waiting: list[Group] = []
        self.groups: list[Group] = []

    @property
    def idle(self) -> bool:
        """True when there is nothing to do."""
        return not self.waiting and not self.groups

    def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raise ContextTooLong, and UserError where the beams of a prompt could never fit into the cache."""
        self.engine.check(prompt, sampling)
        need, pool = _pages(self.engine, prompt, sampling), self.engine.pool
        if need > pool.count:
            raise UserError(
                f"{sampling.beams} beams of {len(prompt) + _limit(self.engine, prompt, sampling):,} tokens need {need:,} pages of the "
                f"cache, and it has {pool.count:,}.",
                where="beams",
                cure="Take fewer beams, a smaller max_tokens, or a shorter prompt.",
            )

    def add(self, prompt: Sequence[int], sampling: Sampling, embeds_TD: Tensor | None = None) -> int:
        """The id of a new request, of the engine's count; one that `check` has passed."""
        engine, request = self.engine, next(self.engine.ids)
        text = Text.begin(engine.tokenizer, prompt, sampling, request=request, limit=_limit(engine, prompt, sampling))
        text.embeds_TD = embeds_TD
        search = Search(sampling, text.limit, text.stop_ids)
        self.waiting.append(Group(search, [text], _pages(engine, prompt, sampling)))
        return request

    def cancel(self, request: int) -> None:
        """Drop a search; its pages are free at once. Unknown and finished ones are no error."""
        self.waiting = [group for group in self.waiting if group.texts[0].request != request]
        for group in [group for group in self.groups if group.texts[0].request == request]:
            self._release(group)
        self._settle()

    @torch.inference_mode()
    def step(self) -> list[tuple[int, list[Hypothesis]]]:
        """(request, the `sampling.n` best answers found, best first) of the searches that are over after this step."""
        pool = self.engine.pool
        while self.waiting and pool.available >= self.waiting[0].need:
            self.groups.append(self.waiting.pop(0))
            pool.promised += self.groups[-1].need
        pool.promised = 0  # what is promised is taken here
        over = _step(self.engine, self.groups) if self.groups else []
        for group in over:
            self._release(group)
        self._settle()
        return [
            (group.texts[0].request, [answer for _, answer in group.search.complete[: group.search.sampling.n]])
            for group in over
        ]

    def _release(self, group: Group) -> None:
        self.groups.remove(group)
        for text in group.texts:
            self.engine.pool.release(text.pages)

    def _settle(self) -> None:
        self.engine.pool.promised = sum(group.owed for group in self.groups)
        self.engine.admits = not self.waiting


def search(
    engine: Engine, prompts: Sequence[Sequence[int]], sampling: Sampling, embeds: Sequence[Tensor | None] | None = None
) -> list[list[Hypothesis]]:
    """The `sampling.n` best answers found to each prompt, best first, over the pages of an engine that does nothing else.

    embeds: for each prompt what stands in for the embedding of its tokens, or None.
    Raises ContextTooLong, and UserError where the beams of a prompt could never fit into the cache.
    """
    searches, found = Searches(engine), dict[int, list[Hypothesis]]()
    for prompt in prompts:
        searches.check(prompt, sampling)
    requests = [
        searches.add(prompt, sampling, embeds[place] if embeds else None) for place, prompt in enumerate(prompts)
    ]
    while not searches.idle:
        found.update(searches.step())
    return [found[request] for request in requests]


def events(
    tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling, request: int, found: Sequence[Hypothesis]
) -> list[Event]:
    """The answers that a search found as a sampled one would have told them, the best with index 0."""
    told: list[Event] = []
    for index, answer in enumerate(found):
        limit = len(answer.tokens)
        text = Text.begin(tokenizer, prompt, sampling, request=request, index=index, limit=limit)
        told += [text.push(Token(*pair)) for pair in zip(answer.tokens, answer.logprobs, strict=True)]
    return told


def _limit(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> int:
    return sampling.max_tokens or engine.context - len(prompt)


def _pages(engine: Engine, prompt: Sequence[int], sampling: Sampling) -> int:
    """How many pages the beams of a prompt take at most: its full ones once, the rest for each beam."""
    size, longest = engine.pool.size, len(prompt) + _limit(engine, prompt, sampling) - 1  # the last token is never read
    shared = len(prompt) // size
    return shared + sampling.beams * (-(-longest // size) - shared)


def _step(engine: Engine, groups: Sequence[Group]) -> list[Group]:
    """Read the last token of every beam, or a piece of a prompt; the groups whose search is over."""
    rows: list[Row] = []
    budget = engine.prefill_tokens
    if engine.running:
        budget = min(budget, max(BLOCK, int(engine.pace.prompt_tokens())))
    for group in groups:
        for text in group.texts:
            tokens = text.known[text.cached :][: budget if text.cached < text.prompt_tokens else None]
            if tokens:
                budget -= len(tokens)
                more = engine.pool.take(-(-(text.cached + len(tokens)) // engine.pool.size) - len(text.pages))
                assert more is not None, "admitted within the pages that there are"
                text.pages += more
                rows.append(Row(text, tokens, int(text.cached + len(tokens) == len(text.known))))
    each = torch.split(engine.runner.run(rows), [row.wanted for row in rows])
    logits = dict(zip([row.sequence for row in rows], each, strict=True))
    for row in rows:
        row.sequence.cached += len(row.tokens)
    over: list[Group] = []
    for group in groups:
        if all(text.cached == len(text.known) for text in group.texts):
            logprobs_BV = torch.cat([logits[text] for text in group.texts]).log_softmax(-1)
            (candidates,) = continuations(logprobs_BV, [group.search])
            parents = group.search.take(candidates)
            if parents:
                group.texts = _forked(engine, group.texts, parents)
                for text, answer in zip(group.texts, group.search.open, strict=True):
                    text.known.append(answer.tokens[-1])
            else:
                over.append(group)
    return over


def _forked(engine: Engine, texts: Sequence[Text], parents: Sequence[int]) -> list[Text]:
    """The texts that go on from those of `parents`, each over pages that it may write to."""
    for index, text in enumerate(texts):
        if index not in parents:
            engine.pool.release(text.pages)
    forked: list[Text] = []
    for place, parent in enumerate(parents):
        text = texts[parent]
        if parent in parents[:place]:
            full = text.cached // engine.pool.size
            pages = engine.pool.hold(text.pages[:full])
            if text.pages[full:]:  # begun and not full
                copies = engine.pool.take(1)
                assert copies is not None, "admitted within the pages that there are"
                engine.runner.copy(text.pages[full], copies[0])
                pages += copies
            text = replace(text, known=list(text.known), pages=pages)
        forked.append(text)
    return forked
