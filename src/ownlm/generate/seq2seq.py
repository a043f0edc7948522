"""Encoder-decoders at work: a text goes in, another comes out.

    load("t5-small") ─► Seq2Seq ── generate ─┬─ write: greedy or sampled, text as it comes (and stream)
                                             └─ beam_search: the likeliest of several answers kept side by side

The sources of a batch are read once; each step then feeds one token per answer through the decoder and its cache. An answer that
has ended leaves the batch.

Shapes: B rows (answers, or answers x beams), S source tokens, V vocabulary.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.generate import asking
from ownlm.generate.answers import Answer, as_sampling, plain
from ownlm.generate.sampling import MAX_BEAMS, Sampling, sample
from ownlm.generate.sequence import Event
from ownlm.generate.sequence import Sequence as Writing
from ownlm.generate.text import StopText
from ownlm.models.cache import KVCache
from ownlm.models.encoder_decoder import EncoderDecoder, Source
from ownlm.models.quantize import count_weights
from ownlm.records import Completion
from ownlm.tokens.codec import Tokenizer

BATCH_TOKENS = 8192  # source tokens of one batch, padding and beams included
BATCH_ROWS = MAX_BEAMS


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """An answer in the making: its tokens, their log-probabilities and the sum of those; `ended` by a stop token."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0
    ended: bool = False


class Seq2Seq:
    """An encoder-decoder and its tokenizer."""

    def __init__(
        self, model: EncoderDecoder, tokenizer: Tokenizer, *, name: str = "model", ref: str = "", digest: str = ""
    ) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.name, self.ref, self.digest = name, ref or name, digest

    @property
    def context(self) -> int:
        """Tokens that a source may have, and an answer."""
        return self.model.config.max_tokens

    @property
    def num_parameters(self) -> int:
        return count_weights(self.model)

    def prompt_ids(self, text: str) -> list[int]:
        """The tokens of a source text, its end token included. Raises UserError for anything but a text."""
        if not isinstance(text, str):
            raise UserError(
                "an encoder-decoder reads one text, not messages.", where="prompt", cure='E.g. "summarize: …".'
            )
        return self.tokenizer.document(text)

    @overload
    def generate(self, prompt: str, sampling: Sampling | None = None, **fields: Any) -> Completion: ...
    @overload
    def generate(self, prompt: Sequence[str], sampling: Sampling | None = None, **fields: Any) -> list[Completion]: ...
    def generate(
        self, prompt: str | Sequence[str], sampling: Sampling | None = None, **fields: Any
    ) -> Completion | list[Completion]:
        """What the model makes of a text, or of each of a list of texts.

        Keywords are the fields of `Sampling`: max_tokens, temperature, top_k, top_p, seed, stop, beams, … Greedy by default.
        Raises UserError for settings that exclude each other.
        """
        settings = plain(as_sampling(sampling, fields))
        texts = [prompt] if isinstance(prompt, str) else prompt
        done = self.answers([self.prompt_ids(text) for text in texts], settings)
        return done[0] if isinstance(prompt, str) else done

    def answers(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """What the model makes of each source, given as tokens."""
        results: list[Completion | None] = [None] * len(prompts)
        work = self._written if sampling.beams == 1 else self._searched
        for chosen in batches(prompts, sampling.beams):
            found = work([prompts[index] for index in chosen], sampling)
            for index, completion in zip(chosen, found, strict=True):
                results[index] = completion
        return [completion for completion in results if completion is not None]

    def translate(self, texts: Sequence[str], *, source: str, target: str, **fields: Any) -> list[Completion]:
        """Each text in another language, asked as T5 was trained; languages by name or ISO code. `fields`: see `generate`."""
        return self._asked("translate", texts, fields, source=asking.language(source), target=asking.language(target))

    def summarize(self, texts: Sequence[str], **fields: Any) -> list[Completion]:
        """Each text in short."""
        return self._asked("summarize", texts, fields)

    def answer(self, question: str, context: str, **fields: Any) -> Completion:
        """What the model answers from the context."""
        return self._asked("answer", [context], fields, question=question)[0]

    def _asked(self, kind: str, texts: Sequence[str], fields: dict[str, Any], **words: str) -> list[Completion]:
        asked = asking.prompts(kind, "prefix", texts, **words)
        return self.generate(asked, **{"max_tokens": asking.TASKS_TOKENS[kind], **fields}) if asked else []

    def stream(self, prompt: str, sampling: Sampling | None = None, **fields: Any) -> Generator[str, None, None]:
        """The pieces of the answer's text, as they come; of a search over beams the whole, which is known at the end only."""
        settings = plain(as_sampling(sampling, fields))
        if settings.beams > 1:
            yield self.generate(prompt, settings).text
            return
        for event in self.events([self.prompt_ids(prompt)], settings):
            if event.text:
                yield event.text

    def events(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[Event]:
        """One event per token of each answer; `request` is the place of its source in `prompts`."""
        limit, stops = self._limits(sampling)
        answers = [
            Writing(
                request=index,
                index=0,
                prompt_tokens=len(prompt),
                known=list(prompt),
                sampling=sampling,
                limit=limit,
                stop_ids=stops,
                generator=sampling.generator(0),
                decode=self.tokenizer.decode_stream(),
                stop_text=StopText(sampling.stop),
            )
            for index, prompt in enumerate(prompts)
        ]
        return write(self.model, answers)

    def _limits(self, sampling: Sampling) -> tuple[int, frozenset[int]]:
        if sampling.form is not None:
            raise UserError("encoder-decoders write no answers of a given form.", where="form")
        stops = frozenset(self.tokenizer.stop_ids) if sampling.stop_ids is None else sampling.stop_ids
        return sampling.max_tokens or self.model.config.max_tokens, stops

    def _written(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        answers = [Answer() for _ in prompts]
        for event in self.events(prompts, sampling):
            answers[event.request].add(event)
        return [answer.completion(len(prompt)) for answer, prompt in zip(answers, prompts, strict=True)]

    def _searched(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        limit, stops = self._limits(sampling)
        found = beam_search(self.model, prompts, sampling, limit=limit, stop_ids=stops)
        return [
            Completion(
                text=self.tokenizer.decode(best.tokens[:-1] if best.ended else best.tokens),
                tokens=best.tokens,
                logprobs=best.logprobs,
                finish_reason="stop" if best.ended else "length",
                prompt_tokens=len(prompt),
            )
            for best, prompt in zip(found, prompts, strict=True)
        ]


def batches(prompts: Sequence[Sequence[int]], beams: int) -> Iterator[list[int]]:
    """Which sources to read together: neighbours of equal length waste no padding."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    while order:
        rows = max(1, min(BATCH_ROWS, BATCH_TOKENS // len(prompts[order[0]])) // beams)
        chosen, order = order[:rows], order[rows:]
        yield chosen


def read(model: EncoderDecoder, prompts: Sequence[Sequence[int]]) -> Source:
    """The sources, padded on the right. Raises UserError for a token the model doesn't have."""
    vocab_size, device = model.config.vocab_size, model.device
    wrong = next((id for prompt in prompts for id in prompt if not 0 <= id < vocab_size), None)
    if wrong is not None:
        raise UserError(f"{wrong} is not a token of this model (0 to {vocab_size - 1}).", where="prompt")
    width = max(map(len, prompts))
    tokens_BS = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask_BS = torch.arange(width, device=device) < lengths_B[:, None]
    padded = None if bool(mask_BS.all()) else mask_BS
    return model.source(model.encode(tokens_BS, padded), padded)


def _cache(model: EncoderDecoder, rows: int, limit: int) -> KVCache:
    return KVCache(model.config, slots=rows, max_tokens=limit, dtype=model.dtype, device=model.device)


@torch.inference_mode()
def write(model: EncoderDecoder, answers: Sequence[Writing]) -> Iterator[Event]:
    """The events of answers that are written side by side, greedily or sampled, each until it ends."""
    source = read(model, [answer.known for answer in answers])
    limit, device = max(answer.limit for answer in answers), model.device
    cache = _cache(model, len(answers), limit)
    tokens_B1 = torch.full((len(answers), 1), model.config.start_token, device=device)
    for place in range(limit):
        hidden_B1D = model.decode(tokens_B1, source, cache=cache, start=place)
        tokens = sample(
            model.logits(hidden_B1D[:, -1]),
            [answer.sampling for answer in answers],
            [answer.generator for answer in answers],
            [(answer.known, answer.prompt_tokens) for answer in answers],
        )
        events = [answer.push(token) for answer, token in zip(answers, tokens, strict=True)]
        yield from events
        open_rows = [row for row, event in enumerate(events) if event.finish_reason is None]
        if not open_rows:
            return
        if len(open_rows) < len(answers):
            rows = torch.tensor(open_rows, device=device)
            answers, source = [answers[row] for row in open_rows], source.rows(rows)
            cache.reorder(rows, place + 1)
        tokens_B1 = torch.tensor([answer.known[-1:] for answer in answers], device=device)


@torch.inference_mode()
def beam_search(
    model: EncoderDecoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    limit: int,
    stop_ids: frozenset[int],
) -> list[Hypothesis]:
    """The best answer found for each source, of at most `limit` tokens.

    At every step the likeliest continuations of a source's open answers are taken in order: those that end are complete if
    they are among the first `beams`, and the first `beams` that don't end stay open.
    """
    count, device = sampling.beams, model.device
    # So many that `count` of them don't end, whatever the others do.
    width = max(2, 1 + len(stop_ids)) * count
    source = read(model, prompts).rows(torch.arange(len(prompts), device=device).repeat_interleave(count))
    cache = _cache(model, len(prompts) * count, limit)
    rows = list(range(len(prompts)))  # those whose search goes on
    open_answers = [[Hypothesis()] + [Hypothesis(total=-1e9)] * (count - 1) for _ in prompts]
    complete: list[list[tuple[float, Hypothesis]]] = [[] for _ in prompts]
    tokens_B1 = torch.full((len(prompts) * count, 1), model.config.start_token, device=device)
    for place in range(limit):
        logprobs_BV = model.logits(model.decode(tokens_B1, source, cache=cache, start=place)[:, -1]).log_softmax(-1)
        going: list[int] = []
        parents: list[int] = []
        for position, (row, candidates) in enumerate(
            zip(rows, _continuations(logprobs_BV, [open_answers[row] for row in rows], width), strict=True)
        ):
            kept: list[tuple[int, Hypothesis]] = []
            for rank, (parent, token, logprob, total) in enumerate(candidates):
                before = open_answers[row][parent]
                ended = token in stop_ids
                new = Hypothesis((*before.tokens, token), (*before.logprobs, logprob), total, ended)
                if ended or place + 1 == limit:
                    if rank < count:
                        complete[row].append((_score(sampling, total, place + 1), new))
                elif len(kept) < count:
                    kept.append((position * count + parent, new))
            complete[row] = sorted(complete[row], key=lambda scored: -scored[0])[:count]
            if kept and _goes_on(sampling, kept[0][1].total, place + 1, limit, complete[row]):
                going.append(position)
                parents += [parent for parent, _ in kept]
                open_answers[row] = [answer for _, answer in kept]
        if not going:
            break
        if len(going) < len(rows):
            source = source.rows(torch.tensor(parents, device=device))
            rows = [rows[position] for position in going]
        cache.reorder(torch.tensor(parents, device=device), place + 1)
        tokens_B1 = torch.tensor([answer.tokens[-1:] for row in rows for answer in open_answers[row]], device=device)
    return [scored[0][1] for scored in complete]


def _continuations(
    logprobs_BV: Tensor, open_answers: Sequence[Sequence[Hypothesis]], width: int
) -> Iterator[list[tuple[int, int, float, float]]]:
    """For each source its `width` likeliest (open answer, next token, that token's log-probability, the sum), best first."""
    count, vocab_size = len(open_answers[0]), logprobs_BV.shape[-1]
    totals = torch.tensor([[answer.total for answer in row] for row in open_answers], device=logprobs_BV.device)
    own = logprobs_BV.view(-1, count, vocab_size)
    best = (own + totals[:, :, None]).flatten(1).topk(min(width, count * vocab_size))
    own_logprobs = own.flatten(1).gather(1, best.indices)
    for sums, places, logprobs in zip(best.values.tolist(), best.indices.tolist(), own_logprobs.tolist(), strict=True):
        yield [
            (place // vocab_size, place % vocab_size, logprob, total)
            for place, logprob, total in zip(places, logprobs, sums, strict=True)
        ]


def _score(sampling: Sampling, total: float, length: int) -> float:
    return total / float(length**sampling.length_penalty)


def _goes_on(
    sampling: Sampling, best: float, length: int, limit: int, complete: Sequence[tuple[float, Hypothesis]]
) -> bool:
    """Whether an open answer may still be worth more than the worst complete one; `best` is the sum of the likeliest."""
    if len(complete) < sampling.beams:
        return True
    if sampling.early_stopping is True:
        return False
    longest = limit if sampling.early_stopping == "never" and sampling.length_penalty > 0 else length
    return _score(sampling, best, longest) > complete[-1][0]
