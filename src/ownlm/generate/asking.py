"""Translating, summarising and answering by writing: the prompt each kind of model is asked with, through the one engine.

encoder-decoder   the prefixes T5 was trained with         "translate English to German: …"   "summarize: …"
chat model        one message of the user
base decoder      a form to fill in, up to the next line    "English: …\\nGerman:"
"""

from collections.abc import Sequence
from typing import Any, Literal

from ownlm.errors import UserError
from ownlm.generate.sampling import Sampling
from ownlm.records import Message

Shape = Literal["prefix", "chat", "form"]
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "de": "German", "el": "Greek", "en": "English", "es": "Spanish", "fa": "Persian",
    "fi": "Finnish", "fr": "French", "he": "Hebrew", "hi": "Hindi", "id": "Indonesian", "it": "Italian", "ja": "Japanese",
    "ko": "Korean", "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sw": "Swahili",
    "ta": "Tamil", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
PROMPTS: dict[str, dict[Shape, str]] = {
    "translate": {
        "prefix": "translate {source} to {target}: {text}",
        "chat": "Translate this text from {source} to {target}. Answer with the translation alone.\n\n{text}",
        "form": "{source}: {text}\n{target}:",
    },
    "summarize": {
        "prefix": "summarize: {text}",
        "chat": "Summarize this text in one or two sentences.\n\n{text}",
        "form": "{text}\n\nIn one sentence:",
    },
    "answer": {
        "prefix": "question: {question} context: {text}",
        "chat": "{text}\n\nAnswer from this text alone, as briefly as you can: {question}",
        "form": "{text}\n\nQuestion: {question}\nAnswer:",
    },
}
TASKS_TOKENS = {"translate": 128, "summarize": 96, "answer": 48}


def language(name: str) -> str:
    """The English name of a language: language("de") == "German"; names stay as they are."""
    if not name.strip():
        raise UserError("a language has no name.", cure="Write for example --to German, or --to de.")
    return LANGUAGES.get(name.strip().lower(), name.strip())


def prompts(kind: str, shape: Shape, texts: Sequence[str], **words: str) -> list[Any]:
    """What the model is asked for each text. UserError for an empty one."""
    asked: list[Any] = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise UserError(f"text {number} is empty.", where=kind)
        # The whole prompt at once, so that braces in a text stay what they are.
        prompt = PROMPTS[kind][shape].format(text=text.strip(), **words)
        asked.append([Message(role="user", content=prompt)] if shape == "chat" else prompt)
    return asked


def settings(kind: str, shape: Shape, room: int, fields: dict[str, Any]) -> Sampling:
    """How to write: greedily, up to the next line where a form is filled in, within the `room` that prompts leave; `fields` change it."""
    stop = {"stop": ("\n",)} if shape == "form" else {}
    return Sampling(**{"max_tokens": max(1, min(TASKS_TOKENS[kind], room)), **stop, **fields})
