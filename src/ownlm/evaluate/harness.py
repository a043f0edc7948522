"""Ask a model, keep every answer, count.

    a task: (Model, Settings) -> Result ── scores with intervals, every answer, details for the report
                   │
                   ├── Model.generate   what it writes, greedily
                   └── logprobs         how likely it finds given tokens

A task is a function bound to its questions. A score is a property of the model: batches are cut by length, padded on the
right where a causal model never looks, and a different `batch_tokens` moves log-probabilities by rounding only.

Shapes: B rows, T tokens, N scored tokens, D hidden size, V vocabulary.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ownlm.errors import UserError
from ownlm.generate.model import Model
from ownlm.generate.sampling import Sampling
from ownlm.generate.seq2seq import Seq2Seq
from ownlm.records import Completion, Message, Score
from ownlm.report import Reporter

LOGITS = 1 << 22  # numbers in the largest block of logits held at a time (16 MB)
PROMPTS = 256  # questions between two lines of progress

T = TypeVar("T")
Ids: TypeAlias = Sequence[int]
Prompt: TypeAlias = str | list[Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to ask.

    limit         at most so many items per task, drawn with the seed; None: all
    max_bytes     at most so much held-out text for bits per byte
    max_tokens    of one generated answer
    batch_tokens  tokens of one forward pass
    prefix        before each source of seq2seq
    """

    limit: int | None = None
    max_bytes: int = 300_000
    max_tokens: int = 32
    batch_tokens: int = 8192
    prefix: str = ""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question with what was expected and what came. `confidence` is the probability the model gave its own answer."""

    task: str
    skill: str
    prompt: str
    expected: str
    given: str
    ok: bool
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a task found. `details` are JSON for the report; `skipped` items did not fit into the model's context."""

    task: str
    scores: tuple[Score, ...]
    answers: tuple[Answer, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    seconds: float = 0.0


Task: TypeAlias = Callable[[Any, Settings, Reporter], Result]  # of a Model; examples of seq2seq also of a Seq2Seq


@dataclass(frozen=True, slots=True)
class Span:
    """The natural log-probability of each token of a continuation, and whether each was the likeliest."""

    logprobs: NDArray[np.float64]
    greedy: bool

    @property
    def total(self) -> float:
        return float(self.logprobs.sum())


def evaluate_model(
    model: Model, tasks: Mapping[str, Task], settings: Settings | None = None, reporter: Reporter | None = None
) -> list[Score]:
    """Every score of every task, in their order."""
    return [score for result in measure(model, tasks, settings, reporter) for score in result.scores]


def measure(
    model: Model | Seq2Seq,
    tasks: Mapping[str, Task],
    settings: Settings | None = None,
    reporter: Reporter | None = None,
) -> list[Result]:
    """Every task's result, with its seconds. Raises UserError when nothing of a task fits into the model's context."""
    settings, reporter = settings or Settings(), reporter or Reporter.silent()
    results = []
    for name, task in tasks.items():
        started = time.monotonic()
        result = replace(task(model, settings, reporter), task=name)
        results.append(replace(result, seconds=time.monotonic() - started))
        if result.skipped:
            reporter.line(f"{name}: {result.skipped} items do not fit into {model.context} tokens and were not asked.")
        for score in result.scores:
            reporter.event(
                "score", task=score.task, metric=score.metric, value=score.value, low=score.low, high=score.high
            )
    return results


def draw(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` of the items, a random choice that depends on the seed only, in their own order."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), limit))]


def complete(
    model: Model,
    prompts: Sequence[Prompt],
    settings: Settings,
    reporter: Reporter,
    *,
    task: str,
    stop: tuple[str, ...] = (),
) -> list[Completion | None]:
    """The greedy answer to each prompt; None where prompt and answer would not fit into the context."""
    found: list[Completion | None] = [None] * len(prompts)
    fitting = [
        index
        for index, prompt in enumerate(prompts)
        if len(model.prompt_ids(prompt)) + settings.max_tokens <= model.context
    ]
    require(fitting, prompts, task, model)
    for start in range(0, len(fitting), PROMPTS):
        chosen = fitting[start : start + PROMPTS]
        ids = [model.prompt_ids(prompts[index]) for index in chosen]
        answers = model.answers(ids, Sampling(max_tokens=settings.max_tokens, stop=stop))
        for index, answer in zip(chosen, answers, strict=True):
            found[index] = answer[0]
        reporter.status(f"{task}: {start + len(chosen)} of {len(fitting)} answered")
    return found


def require(fitting: Sequence[object], items: Sequence[object], task: str, model: Model) -> None:
    """Raise UserError if there is nothing to ask, or nothing that the model could read."""
    if not items:
        raise UserError("there is nothing to ask.", where=task)
    if not fitting:
        raise UserError(f"no item fits into the model's context of {model.context} tokens.", where=task)


@torch.inference_mode()
def logprobs(model: Model, pairs: Sequence[tuple[Ids, Ids]], batch_tokens: int) -> list[Span]:
    """The Span of the second of each pair of token lists, read after the first.

    Each pair fits into the context: len(first) + len(second) - 1 <= model.context, and neither is empty.
    """
    spans: list[Span | None] = [None] * len(pairs)
    # The last token predicts nothing that is asked for.
    rows = [[*before, *scored][:-1] for before, scored in pairs]
    for chosen in batches([len(row) for row in rows], batch_tokens):
        hidden_BTD = model.hidden(_padded([rows[index] for index in chosen]))
        wanted = [slice(len(pairs[index][0]) - 1, len(rows[index])) for index in chosen]
        hidden_ND = torch.cat([hidden_TD[part] for hidden_TD, part in zip(hidden_BTD, wanted, strict=True)])
        ids_N = torch.tensor([id for index in chosen for id in pairs[index][1]], device=hidden_ND.device)
        logprobs_N, greedy_N = _gather(model, hidden_ND, ids_N)
        start = 0
        for index in chosen:
            end = start + len(pairs[index][1])
            spans[index] = Span(logprobs_N[start:end], bool(greedy_N[start:end].all()))
            start = end
    return [span for span in spans if span is not None]


@torch.inference_mode()
def next_logprobs(model: Model, rows: Sequence[Ids], ids: Ids, batch_tokens: int) -> NDArray[np.float64]:
    """(B, K) natural log-probabilities of each of K `ids` as the next token of each of B rows."""
    found_BK = np.empty((len(rows), len(ids)))
    for chosen in batches([len(row) for row in rows], batch_tokens):
        hidden_BTD = model.hidden(_padded([rows[index] for index in chosen]))
        last_BD = torch.stack(
            [hidden_TD[len(rows[index]) - 1] for index, hidden_TD in zip(chosen, hidden_BTD, strict=True)]
        )
        found_BK[chosen] = model.decoder.logits(last_BD).float().log_softmax(-1)[:, list(ids)].double().cpu().numpy()
    return found_BK


def _padded(rows: Sequence[Ids]) -> torch.Tensor:
    """(B, T), padded on the right with an arbitrary token, the longest row first."""
    return torch.tensor([[*row, *[0] * (len(rows[0]) - len(row))] for row in rows])


def _gather(
    model: Model, hidden_ND: torch.Tensor, ids_N: torch.Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    logprobs, greedy = [], []
    rows = max(1, LOGITS // model.tokenizer.vocab_size)
    for start in range(0, len(ids_N), rows):
        ids = ids_N[start : start + rows]
        logits = model.decoder.logits(hidden_ND[start : start + rows]).float()
        logprobs.append(logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0].double().cpu().numpy())
        greedy.append((logits.argmax(-1) == ids).cpu().numpy())
    return np.concatenate(logprobs), np.concatenate(greedy)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first; each holds at most `batch_tokens` with its padding, or one row."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        end = start + max(1, batch_tokens // max(1, lengths[order[start]]))
        yield order[start:end]
        start = end


def windows(begin: Ids, ids: Ids, context: int) -> list[tuple[Ids, Ids]]:
    """Pairs (read, scored) that score every token of a document once, each after as much of it as fits.

    The first window scores all that it holds; the later ones move on by half the context, so that a token beyond the
    first window is read after half a context at least:

        windows([9], [1, 2, 3, 4, 5], 4) == [([9], [1, 2, 3, 4]), ([2, 3, 4], [5])]
    """
    first = context + 1 - len(begin)
    stride = max(1, context // 2)
    pairs: list[tuple[Ids, Ids]] = [(begin, ids[:first])]
    for start in range(first, len(ids), stride):
        pairs.append((ids[start + stride - context - 1 : start], ids[start : start + stride]))
    return pairs
