"""The error tree, split by who reads it.

`UserError` and its children are sentences for the person at the keyboard or the client of the API: what is wrong, where,
and the cure. The command line prints them without a traceback and exits with code 2. A programmer's mistake is an
`AssertionError` or any other exception, and keeps its traceback.
"""


class UserError(Exception):
    """Bad input, told so that the reader can mend it: "where: what cure"."""

    def __init__(self, what: str, *, where: str = "", cure: str = "") -> None:
        self.what, self.where, self.cure = what, where, cure
        super().__init__(" ".join(part for part in (f"{where}:" if where else "", what, cure) if part))


class RecipeError(UserError):
    """A recipe file or a key=value override that can't be read; carries every fault, a line each."""


class ArtifactError(UserError):
    """An artifact that is damaged, incomplete, or of the wrong kind."""


class NotFound(UserError):
    """A name or path that doesn't exist."""


class ContextTooLong(UserError):
    """A prompt that doesn't fit into the model, or with its keys and values into memory; nothing is ever cut off silently.

    whole  the model's own context, where `context` is what the cache has room for
    """

    def __init__(self, prompt_tokens: int, max_tokens: int, context: int, whole: int | None = None) -> None:
        self.prompt_tokens, self.max_tokens, self.context = prompt_tokens, max_tokens, context
        limit = f"the model's context is {context} tokens."
        if whole is not None and whole > context:
            limit = f"the cache here holds {context} tokens of a text (the model's context is {whole})."
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and {max_tokens} more were asked for, but {limit}",
            cure=f"Shorten the prompt or ask for at most {max(0, context - prompt_tokens)} new tokens.",
        )


class StorageFull(UserError):
    """No space left on the device; what was there before is still whole."""


class Busy(UserError):
    """Something else holds what was asked for: a port, or the lock of a run."""


class Interrupted(Exception):
    """Ctrl-C, after the state was saved; the message says how to go on. Exit code 130."""
