"""What a model in training can show of itself: something it writes, beside the truth.

Each function returns a sampler for the loop, `(decoder, tokenizer) -> a line`, or None where there is nothing to ask.
"""

import itertools
import random
from collections.abc import Callable
from typing import TypeVar

from ownlm.artifact import Artifact
from ownlm.generate.model import Model
from ownlm.models.decoder import Decoder
from ownlm.records import Conversation, Document, Message, Question, read_jsonl
from ownlm.tokens.codec import Tokenizer

SHOWN = 200  # different samples before the first comes again
MAX_TOKENS = 16
R = TypeVar("R")


def continuations(documents: Artifact) -> Callable[[Decoder, Tokenizer], str] | None:
    """How a base model continues a held-out document, beside how the document goes on."""
    texts = [document.text for document in _drawn(documents, "validation.jsonl", Document)]
    turn = itertools.cycle(texts)

    def sample(decoder: Decoder, tokenizer: Tokenizer) -> str:
        words = next(turn).split(" ")
        cut = min(len(words) // 2, 12)
        told = Model(decoder, tokenizer, slots=1).generate(" ".join(words[:cut]), max_tokens=MAX_TOKENS).text
        return f"{_line(' '.join(words[:cut]))} ▸ {_line(told)}   (truth: {_line(' '.join(words[cut : cut + 8]))})"

    return sample if texts else None


def answers(documents: Artifact) -> Callable[[Decoder, Tokenizer], str] | None:
    """A chat model's answer to a question that training never asks, beside the truth."""
    asked = [(question.prompt, question.answer) for question in _drawn(documents, "questions.jsonl", Question)]
    asked = asked or [
        (before.content, after.content)
        for conversation in _drawn(documents, "conversations_validation.jsonl", Conversation)
        for before, after in zip(conversation.messages[:1], conversation.messages[1:2], strict=True)
    ]
    turn = itertools.cycle(asked)

    def sample(decoder: Decoder, tokenizer: Tokenizer) -> str:
        question, truth = next(turn)
        told = Model(decoder, tokenizer, slots=1).generate(
            [Message(role="user", content=question)], max_tokens=MAX_TOKENS
        )
        return f"{_line(question)} ▸ {_line(told.text)}   (truth: {_line(truth)})"

    return sample if asked else None


def _drawn(artifact: Artifact, file: str, cls: type[R]) -> list[R]:
    """Some records from the beginning of a file, in a fixed random order; none where there is no such file."""
    if not artifact.has(file):
        return []
    records = list(itertools.islice(read_jsonl(artifact.file(file), cls), 10 * SHOWN))
    return random.Random(0).sample(records, k=min(SHOWN, len(records)))


def _line(text: str) -> str:
    return " ".join(text.split())[:100]
