"""Encoder-decoders at work: a text goes in, another comes out.

    load("t5-small") ─► Seq2Seq ── generate ─┬─ write: greedy or sampled, text as it comes (and stream)
                                             └─ beam_search: the likeliest of several answers kept side by side

The sources of a batch are read once; each step then feeds one token per answer through the decoder and its cache. An answer that
has ended leaves the batch.

Shapes: B rows (answers, or answers x beams), S source tokens, V vocabulary.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any, overload

import torch

from ownlm.errors import UserError
from ownlm.generate import asking
from ownlm.generate.answers import Answer, as_sampling, plain
from ownlm.generate.beams import Hypothesis, Search, continuations
from ownlm.generate.sampling import MAX_BEAMS, Sampling, sample
from ownlm.generate.sequence import Event
from ownlm.generate.sequence import Sequence as Writing
from ownlm.models.cache import KVCache
from ownlm.models.encoder_decoder import EncoderDecoder, Source
from ownlm.quantization.codes import count_weights
from ownlm.records import Completion
from ownlm.tokens.codec import Tokenizer

BATCH_TOKENS = 8192  # source tokens of one batch, padding and beams included
BATCH_ROWS = MAX_BEAMS


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
        limit = self._limit(sampling)
        answers = [
            Writing.begin(self.tokenizer, prompt, sampling, request=index, limit=limit)
            for index, prompt in enumerate(prompts)
        ]
        return write(self.model, answers)

    def _limit(self, sampling: Sampling) -> int:
        if sampling.form is not None:
            raise UserError("encoder-decoders write no answers of a given form.", where="form")
        if sampling.answers > 1:
            raise UserError("encoder-decoders write one answer to a text.", where="n, best_of", cure="Leave them out.")
        return sampling.max_tokens or self.model.config.max_tokens

    def _written(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        answers = [Answer() for _ in prompts]
        for event in self.events(prompts, sampling):
            answers[event.request].add(event)
        return [answer.completion(len(prompt)) for answer, prompt in zip(answers, prompts, strict=True)]

    def _searched(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        stop_ids = sampling.stops(self.tokenizer.stop_ids)
        found = beam_search(self.model, prompts, sampling, limit=self._limit(sampling), stop_ids=stop_ids)
        return [best.completion(self.tokenizer, prompt) for best, prompt in zip(found, prompts, strict=True)]


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
    """The best answer found for each source, of at most `limit` tokens (beams.py)."""
    count, device = sampling.beams, model.device
    source = read(model, prompts).rows(torch.arange(len(prompts), device=device).repeat_interleave(count))
    cache = _cache(model, len(prompts) * count, limit)
    # Equal beams at the beginning, of which all but one are worth nothing.
    beginning = [Hypothesis()] + [Hypothesis(total=-1e9)] * (count - 1)
    searches = [Search(sampling, limit, stop_ids, open=beginning) for _ in prompts]
    going = searches  # those whose search goes on
    tokens_B1 = torch.full((len(prompts) * count, 1), model.config.start_token, device=device)
    for place in range(limit):
        logprobs_BV = model.logits(model.decode(tokens_B1, source, cache=cache, start=place)[:, -1]).log_softmax(-1)
        open_: list[Search] = []
        rows: list[int] = []
        for position, (search, candidates) in enumerate(zip(going, continuations(logprobs_BV, going), strict=True)):
            if parents := search.take(candidates):
                open_.append(search)
                rows += [position * count + parent for parent in parents]
        if not open_:
            break
        if len(open_) < len(going):
            source = source.rows(torch.tensor(rows, device=device))
        going = open_
        cache.reorder(torch.tensor(rows, device=device), place + 1)
        tokens_B1 = torch.tensor([answer.tokens[-1:] for search in going for answer in search.open], device=device)
    return [search.complete[0][1] for search in searches]
