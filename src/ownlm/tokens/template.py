"""Chat templates: messages -> the exact text a model reads, with the spans it is trained on.

    messages ──break special-token strings──► Jinja, sandboxed ──► text ──read off marks──► Rendered(text, spans, guard)

A template is what a Hugging Face checkpoint ships as `chat_template`; the environment (`rendering.py`) offers what transformers offers,
so both render the same text. Our own template is rendered in this process, any other in a child with limits (`child.py`).
Three private-use characters that occur nowhere in the input do the book-keeping: a *guard* inside every special-token string
that a message spells out, and two marks around each `{% generation %}` block. The codec removes the guard after it has looked
for special tokens, so a message never yields one.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, Protocol

from ownlm.errors import UserError
from ownlm.tokens import rendering
from ownlm.tokens.child import Child

MAX_SOURCE = 2**20  # characters; the largest template in use has twenty thousand
# The names under which a message's reasoning travels; templates read the first, GPT-OSS's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")

# ChatML, the layout of Qwen: other tools know these token strings as the ends of a turn and of a document.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """Text as the template wrote it. `spans` are the [start, end) characters to train on; `guard` is no part of the text
    and stands inside each special-token string that came from a message."""

    text: str
    spans: tuple[tuple[int, int], ...]
    guard: str


class Renderer(Protocol):
    """Answers a request as `rendering.Template` says."""

    def reply(self, request: Mapping[str, Any]) -> rendering.Reply: ...


class ChatTemplate:
    """A template for a vocabulary whose special tokens are `specials`. It is compiled when it is first rendered.

    `names` are the variables a template may print (bos_token, eos_token, ...); `stops` are the tokens that end a turn.
    """

    def __init__(self, source: str, *, names: Mapping[str, str], specials: Sequence[str], stops: Sequence[str]) -> None:
        if len(source) > MAX_SOURCE:
            raise UserError(
                f"the chat template has {len(source)} characters; {MAX_SOURCE} are the most.",
                cure="Mend chat_template.jinja beside tokenizer.json.",
            )
        self.source, self.names, self.specials, self.stops = source, dict(names), tuple(specials), tuple(stops)
        self._beginnings = {token[:size] for token in specials for size in range(1, len(token))}
        self._endings = {token[size:] for token in specials for size in range(1, len(token))}
        self._longest = max(map(len, specials), default=0)

    @cached_property
    def _renderer(self) -> Renderer:
        return rendering.Template(self.source) if self.source == CHATML else Child(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendered:
        """The text of the conversation and its trained spans. `variables` reach the template by their names.

        Raises UserError with the template's own complaint, or when it exceeds its limits of time, memory and length.

        A template without `{% generation %}` says itself where an answer begins: at the end of what it renders as the
        prompt for that answer. The answer ends with the first stop token. Where the template rewrites history so that
        this fails, there are no spans; `trained` tells.
        """
        given = _plain({"tools": tools, "documents": documents, **self.names, **variables})
        try:
            turns = [_turn(message) for message in messages]
            guard, opened, closed = _unused_characters([self.source, *_strings(turns), *_strings(given)], 3)
            safe = [self._safe(turn, guard) for turn in turns]
            # Our own names of special tokens are the template's to print.
            safe_given = {
                name: value if value == self.names.get(name) else self._safe(value, guard)
                for name, value in given.items()
            }
        except RecursionError:
            raise UserError("the messages are nested too deep.", cure="Send plainer messages.") from None
        marks = rendering.GENERATION_TAG.search(self.source) is not None
        answers = [] if marks else [turn for turn, message in enumerate(safe) if message.get("role") == "assistant"]
        reply = self._renderer.reply(
            {
                "messages": safe,
                "variables": {**safe_given, "generation_start": opened, "generation_end": closed},
                "cuts": [(len(safe), add_generation_prompt), *((turn, True) for turn in answers)],
            }
        )
        match reply.get("fault"):
            case None:
                text, *prompts = reply["texts"]
            case "syntax":
                raise UserError(
                    f"the chat template can't be read: {reply['message']}.",
                    cure="Mend chat_template.jinja beside tokenizer.json.",
                )
            case "length":
                raise UserError(
                    f"the chat template prints without end: {reply['message']}.", cure="Use another template."
                )
            case _:
                raise UserError(
                    f"the chat template doesn't accept these messages: {reply['message']}.",
                    cure="Check their roles and order.",
                )
        if marks:
            text, spans = _read_marks(text, opened, closed)
        else:
            spans = self._answers(text, prompts)
        return Rendered(text=text, spans=spans, guard=guard)

    def _answers(self, text: str, prompts: Iterable[str | None]) -> tuple[tuple[int, int], ...]:
        spans = []
        for prompt in prompts:
            if prompt is None:
                return ()
            ends = [at + len(stop) for stop in self.stops if (at := text.find(stop, len(prompt))) >= 0]
            if not text.startswith(prompt) or not ends:
                return ()
            spans.append((len(prompt), min(ends)))
        return tuple(spans)

    def _safe(self, value: Any, guard: str) -> Any:
        """The value with its strings broken by the guard. Names (of fields, roles, kinds of parts) are what a template compares
        with, so they are broken only where they hold a whole special token."""
        if isinstance(value, str):
            return self._break(value, guard)
        if isinstance(value, Mapping):
            return {
                self._break_name(str(key), guard): self._break_name(item, guard)
                if key in ("role", "type") and isinstance(item, str)
                else self._safe(item, guard)
                for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self._safe(item, guard) for item in value]
        return value

    def _break_name(self, name: str, guard: str) -> str:
        if name.isidentifier() and not any(token in name for token in self.specials):
            return name
        return self._break(name, guard)

    def _break(self, text: str, guard: str) -> str:
        """Put `guard` into each special-token string, and where the text could complete one across its border.

        With <s> special and | as guard: "a<s>" -> "a<|s>", "a<" -> "a<|", "s>b" -> "|s>b".
        """
        for token in self.specials:
            if token in text:
                text = text.replace(token, token[0] + guard + token[1:])
        for size in range(min(len(text), self._longest), 0, -1):
            if text[-size:] in self._beginnings:
                text = text[: len(text) - size + 1] + guard + text[len(text) - size + 1 :]
        if any(text[:size] in self._endings for size in range(1, min(len(text), self._longest) + 1)):
            text = guard + text
        return text


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as plain data: fields of nothing are absent, and reasoning stands under each of its names that templates read."""
    turn = {key: _plain(value) for key, value in message.items() if value is not None}
    reasoning = next((turn[name] for name in REASONING if name in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value in JSON's types, with a placeholder for what has none: templates ask only whether an image is there."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


def _read_marks(text: str, opened: str, closed: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """("a<b>c", "<", ">") -> ("abc", ((1, 2),))"""
    parts, spans, size, start = [], [], 0, 0
    for part in re.split(f"([{opened}{closed}])", text):
        if part == opened:
            start = size
        elif part == closed:
            spans.append((start, size))
        else:
            parts.append(part)
            size += len(part)
    return "".join(parts), tuple(spans)


def _unused_characters(texts: Iterable[str], count: int) -> list[str]:
    """The first `count` private-use characters (Unicode chapter 23.5) that none of the texts contains."""
    used = {character for text in texts if not text.isascii() for character in set(text) if character >= "\ue000"}
    private = chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
    free = list(islice((character for character in map(chr, private) if character not in used), count))
    assert len(free) == count, "every private-use character of Unicode is in use"
    return free


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)
