"""Chat templates: messages -> the exact text a model reads, with the spans it is trained on.

    messages ──break special-token strings──► Jinja sandbox ──► text ──read off marks──► Rendered(text, spans, guard)

A template is what a Hugging Face checkpoint ships as `chat_template`; the environment here offers what transformers offers
(trim_blocks, lstrip_blocks, loop controls, `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`), so both
render the same text. Three private-use characters that occur nowhere in the input do the book-keeping: a *guard* inside
every special-token string that a message spells out, and two marks around each `{% generation %}` block.
The codec removes the guard after it has looked for special tokens, so a message never yields one.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ownlm.errors import UserError

GENERATION_TAG = re.compile(r"{%[-+]?\s*generation\s*[-+]?%}")

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


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: prints its body between the two marks of this rendering."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as an instance attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opened, closed = (
            nodes.Output([nodes.Name(name, "load")], lineno=line) for name in ("generation_start", "generation_end")
        )
        return [opened, *body, closed]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **style: Any) -> str:
    # Jinja's own filter escapes HTML characters, which would reach the model as <.
    return json.dumps(value, ensure_ascii=ensure_ascii, **style)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    return environment


class ChatTemplate:
    """A compiled template for a vocabulary whose special tokens are `specials`.

    `names` are the variables a template may print (bos_token, eos_token, ...); `stops` are the tokens that end a turn.
    """

    def __init__(self, source: str, *, names: Mapping[str, str], specials: Sequence[str], stops: Sequence[str]) -> None:
        self.source, self.names, self.specials, self.stops = source, dict(names), tuple(specials), tuple(stops)
        self._beginnings = {token[:size] for token in specials for size in range(1, len(token))}
        self._endings = {token[size:] for token in specials for size in range(1, len(token))}
        self._longest = max(map(len, specials), default=0)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as fault:
            raise UserError(
                f"the chat template can't be read: {fault}.", cure="Mend chat_template.jinja beside tokenizer.json."
            ) from None

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> Rendered:
        """The text of the conversation and its trained spans. Raises UserError with the template's own complaint.

        A template without `{% generation %}` says itself where an answer begins: at the end of what it renders as the
        prompt for that answer. The answer ends with the first stop token. Where the template rewrites history so that
        this fails, there are no spans; `trained` tells.
        """
        guard, opened, closed = _unused_characters([self.source, *_strings(messages)], 3)
        safe = _map_strings(messages, lambda text: self._break(text, guard))

        def write(turns: Sequence[Any], prompt: bool) -> str:
            try:
                return self._template.render(
                    messages=turns,
                    tools=None,
                    documents=None,
                    add_generation_prompt=prompt,
                    generation_start=opened,
                    generation_end=closed,
                    **self.names,
                )
            except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as fault:
                raise UserError(
                    f"the chat template doesn't accept these messages: {fault}.",
                    cure="Check their roles and order.",
                ) from None

        text = write(safe, add_generation_prompt)
        if GENERATION_TAG.search(self.source):
            text, spans = _read_marks(text, opened, closed)
        else:
            prompts = (write(safe[:turn], True) for turn, message in enumerate(safe) if message["role"] == "assistant")
            spans = self._answers(text, prompts)
        return Rendered(text=text, spans=spans, guard=guard)

    def _answers(self, text: str, prompts: Iterable[str]) -> tuple[tuple[int, int], ...]:
        spans = []
        for prompt in prompts:
            ends = [at + len(stop) for stop in self.stops if (at := text.find(stop, len(prompt))) >= 0]
            if not text.startswith(prompt) or not ends:
                return ()
            spans.append((len(prompt), min(ends)))
        return tuple(spans)

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
    private = [*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]
    used = {character for text in texts for character in set(text) if character >= "\ue000"}
    free = [chr(code) for code in private if chr(code) not in used][:count] if used else list(map(chr, private[:count]))
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


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value
