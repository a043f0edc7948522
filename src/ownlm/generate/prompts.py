"""What a model is asked with: a text to continue, or the messages of a chat to answer."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, cast

from ownlm.errors import UserError
from ownlm.records import Message

Chat: TypeAlias = Sequence[Message | Mapping[str, Any]]
Prompt: TypeAlias = str | Chat
ROLES = ("system", "user", "assistant")


def as_message(message: Message | Mapping[str, Any]) -> Message:
    """A Message from itself or from {"role": …, "content": …}. Raises UserError."""
    if isinstance(message, Message):
        return message
    if set(message) != {"role", "content"} or message["role"] not in ROLES or not isinstance(message["content"], str):
        raise UserError(
            f"{dict(message)!r} is not a message.",
            cure=f'A message is {{"role": one of {", ".join(ROLES)}, "content": text}}.',
        )
    return Message(role=cast(Any, message["role"]), content=message["content"])


def is_one(prompt: Prompt | Sequence[str] | Sequence[Chat]) -> TypeGuard[Prompt]:
    """True for a single prompt: a text, or a list of messages."""
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Message | Mapping))
