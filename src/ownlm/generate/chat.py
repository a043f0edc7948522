"""A chat in the terminal: the answer streams, Ctrl-C stops the answer, /reset forgets, /quit leaves."""

import sys
from collections.abc import Callable
from typing import TextIO

from ownlm.errors import ContextTooLong
from ownlm.generate.model import Model
from ownlm.generate.sampling import Sampling
from ownlm.records import Message

HELP = "Write a message and press Enter. /reset forgets the conversation, /quit (or Ctrl-D) leaves, Ctrl-C stops an answer."


def chat(
    model: Model,
    *,
    sampling: Sampling | None = None,
    system: str | None = None,
    read: Callable[[str], str] = input,
    out: TextIO | None = None,
) -> list[Message]:
    """Talk with the model until /quit; returns the conversation as it then stood.

    system    a first message that stays through /reset
    """
    out = out or sys.stdout
    beginning = [Message(role="system", content=system)] if system else []
    messages = list(beginning)
    print(f"{model.ref}, context {model.context} tokens. {HELP}", file=out)
    while True:
        try:
            text = read("\n> ").strip()
        except EOFError:
            print(file=out)
            return messages
        except KeyboardInterrupt:
            # At an empty prompt Ctrl-C gives a fresh line, as a shell does.
            print("\n/quit leaves.", file=out)
            continue
        if text == "/quit":
            return messages
        if text == "/reset":
            messages = list(beginning)
            print("Forgotten.", file=out)
        elif text.startswith("/"):
            print(HELP, file=out)
        elif text:
            messages = answer(model, [*messages, Message(role="user", content=text)], out, sampling)


def answer(model: Model, messages: list[Message], out: TextIO, sampling: Sampling | None) -> list[Message]:
    """Stream one answer; returns the conversation with it, or without the question when it was too long."""
    pieces: list[str] = []
    stream = model.stream(messages, sampling)
    try:
        for piece in stream:
            pieces.append(piece)
            print(piece, end="", file=out, flush=True)
        print(file=out)
    except KeyboardInterrupt:
        stream.close()  # frees the slot of the engine at once
        print(" [stopped]", file=out)
    except ContextTooLong as fault:
        print(f"{fault} /reset starts afresh.", file=out)
        return messages[:-1]
    return [*messages, Message(role="assistant", content="".join(pieces))]
