"""The nouns that travel between stages, as frozen records with a JSON line each."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ownlm.errors import ArtifactError

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A text and where it came from. `language` is an ISO 639-1 code, or "und" when nobody could tell."""

    text: str
    source: str
    language: str = "und"
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Turns in order. Training learns the assistant's turns only."""

    messages: tuple[Message, ...]
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt with one right answer, asked as a user's message. `choices` are the answers a guesser would pick from."""

    prompt: str
    answer: str
    skill: str
    choices: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A text, or two, and its label."""

    text: str
    pair: str | None = None
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """The words of a sentence and the tag of each."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question and the text that answers it: `answers` are accepted strings of it, `start` is where the first begins."""

    question: str
    context: str
    answers: tuple[str, ...]
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """A text and what it should become: its translation, its summary."""

    source: str
    target: str


Example = Labelled | Tagged | Asked | Rewritten
ExampleTask = Literal["classification", "tokens", "answer", "seq2seq"]
EXAMPLES: dict[ExampleTask, type[Any]] = {
    "classification": Labelled, "tokens": Tagged, "answer": Asked, "seq2seq": Rewritten,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a model wrote. `tokens` and `logprobs` (natural log, of the token as sampled) have the same length."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A measured number with its 95 % interval [low, high], the n it rests on, and what a guesser would get."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    baseline: float | None = None


def to_json(record: Any) -> dict[str, Any]:
    """The record as plain JSON types."""
    return asdict(record)


def from_json(cls: type[R], data: dict[str, Any]) -> R:
    """The record of class `cls` that `to_json` wrote. Raises TypeError or KeyError when `data` has another shape."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    if cls is Conversation:
        values["messages"] = tuple(Message(**message) for message in values["messages"])
    return cls(**values)


def write_jsonl(path: Path, records: Iterable[Any]) -> int:
    """Write a line of JSON per record and return how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            data = record if isinstance(record, dict) else to_json(record)
            file.write(json.dumps(data, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path, cls: type[R]) -> Iterator[R]:
    """Yield the records of a file one by one, so that a large file never stands in memory."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield from_json(cls, json.loads(line))
            except (json.JSONDecodeError, TypeError, KeyError) as fault:
                raise ArtifactError(f"not a {cls.__name__}: {fault}.", where=f"{path}:{number}") from None
