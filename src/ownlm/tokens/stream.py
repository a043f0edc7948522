"""Decoding while a reply is written: ids come one by one, text goes out as soon as it is certain."""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol


class DecodeStream(Protocol):
    """Turns ids into text one by one; the pieces joined are `Tokenizer.decode` of all ids."""

    def push(self, token: int) -> str:
        """The text that is now certain: maybe nothing, never half a character."""

    def finish(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character."""


class ByteStream:
    """A decode stream for byte-level vocabularies: `table[id]` holds the bytes of a token, none for special ones. Ids beyond it, which
    models with padded vocabularies can choose, spell nothing, as in `Tokenizer.decode`."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._table[token] if token < len(self._table) else b"")

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowStream:
    """A decode stream for any vocabulary: decodes a short window twice and emits the difference, because the text of a
    token may depend on the one before it (leading space, bytes that make up a character)."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._certain = 0  # ids of the window whose text is out

    def push(self, token: int) -> str:
        self._window.append(token)
        old, new = self._texts()
        if len(new) <= len(old) or new.endswith("\ufffd"):
            return ""
        del self._window[: self._certain]
        self._certain = len(self._window)
        return new[len(old) :]

    def finish(self) -> str:
        old, new = self._texts()
        self._certain = len(self._window)
        return new[len(old) :]

    def _texts(self) -> tuple[str, str]:
        return self._decode(self._window[: self._certain]), self._decode(self._window)


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's `bytes_to_unicode`), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTE_OF = _byte_characters()
