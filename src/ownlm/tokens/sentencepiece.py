"""Read a SentencePiece model file: the pieces with scores and types, and how text is normalised before it is cut into them.

The file is one protobuf message (sentencepiece_model.proto: 1 pieces, 2 trainer, 3 normaliser). The reader below knows
the wire format only as far as that message needs: fields of varints, 32 and 64 bits, and bytes. Every length is checked against
what is there, so a damaged file is one error and never more work than its size.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ownlm.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
FLOAT = struct.Struct("<f")
MAX_PIECES = 2_000_000  # the largest vocabularies in use have a quarter of a million


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePiece:
    """A vocabulary of SentencePiece, as its file or a GGUF file describes it. `types` holds NORMAL … BYTE for each piece."""

    kind: Literal["unigram", "bpe"]
    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: bytes
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    whitespace_as_suffix: bool = False
    byte_fallback: bool = False
    unk_id: int | None = 0
    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id: int | None = None

    def of_type(self, *types: int) -> list[str]:
        """The pieces of these types, by id."""
        return [piece for piece, type in zip(self.pieces, self.types, strict=True) if type in types]


def read_model(data: bytes, where: str) -> SentencePiece:
    """The vocabulary in a `.model` file. Raises UserError when the bytes are anything else."""
    try:
        return _read(data)
    except (ValueError, IndexError, struct.error) as fault:
        raise UserError(
            f"not a SentencePiece model: {fault}.", where=where, cure="Restore the file from its source."
        ) from None


def _read(data: bytes) -> SentencePiece:
    pieces, scores, types = [], [], bytearray()
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            piece, score, type = _piece(_bytes(value))
            pieces.append(piece)
            scores.append(score)
            types.append(type)
            if len(pieces) > MAX_PIECES:
                raise ValueError(f"it has more than {MAX_PIECES} pieces")
        elif number == 2:
            trainer.update(_fields(_bytes(value)))
        elif number == 3:
            normaliser.update(_fields(_bytes(value)))
    if not pieces or not trainer:
        raise ValueError("it has no pieces or no trainer's settings")
    kind = KINDS.get(_small(trainer.get(3, 1), 0, 255), "unknown")
    if kind not in ("unigram", "bpe"):
        raise ValueError(f"its kind is {kind}; only unigram and bpe are read")

    def flag(fields: dict[int, int | bytes], number: int, default: bool) -> bool:
        return bool(_small(fields.get(number, int(default)), 0, 1))

    def special(number: int, default: int | None) -> int | None:
        id = trainer.get(number, default)
        return id if isinstance(id, int) and id < len(pieces) else None  # absent: -1, which is written as 2^64 - 1

    charsmap = _bytes(normaliser.get(2, b""))
    check_charsmap(charsmap)
    return SentencePiece(
        kind="bpe" if kind == "bpe" else "unigram",
        pieces=tuple(pieces),
        scores=tuple(scores),
        types=bytes(types),
        charsmap=charsmap,
        add_dummy_prefix=flag(normaliser, 3, True),
        remove_extra_whitespaces=flag(normaliser, 4, True),
        escape_whitespaces=flag(normaliser, 5, True),
        whitespace_as_suffix=flag(trainer, 24, False),
        byte_fallback=flag(trainer, 35, False),
        unk_id=special(40, 0),
        bos_id=special(41, 1),
        eos_id=special(42, 2),
        pad_id=special(43, None),
    )


def _piece(data: bytes) -> tuple[str, float, int]:
    size = data[1]
    if (
        data[0] == 0x0A and size < 128 and len(data) == size + 7 and data[size + 2] == 0x15
    ):  # as most are: text and score
        return data[2 : size + 2].decode(), FLOAT.unpack_from(data, size + 3)[0], NORMAL
    fields = dict(_fields(data))
    score = FLOAT.unpack(_bytes(fields.get(2, bytes(4))))[0]
    return _bytes(fields.get(1, b"")).decode(), score, _small(fields.get(3, NORMAL), NORMAL, BYTE)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message: an int for varints, bytes for the rest."""
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(data, at)
            case 5:
                size = 4
            case other:
                raise ValueError(f"wire type {other} at byte {at}")
        if size > end - at:
            raise ValueError(f"it ends within a field at byte {at}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value = byte & 0x7F
    for shift in range(7, 70, 7):
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at + 1
    raise ValueError(f"a number without end at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where text should be")
    return value


def _small(value: int | bytes, low: int, high: int) -> int:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{value!r:.20} where a number from {low} to {high} should be")
    return value


def check_charsmap(charsmap: bytes) -> None:
    """Raise ValueError unless every step through the normaliser's table stays within it.

    The table is a double array (Aoe 1989, as in darts-clone) and a pool of replacements that each end with a zero byte. The
    library that walks it doesn't look where it steps. From a unit it goes to `place ^ offset ^ byte`: with a whole number of
    blocks of 256 units, that lies inside whenever `place ^ offset` does.
    """
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little")
    pool = charsmap[4 + size :]
    if size % 1024 or size == 0 or len(charsmap) < 4 + size + 1 or pool[-1] != 0:
        raise ValueError("its table of characters is cut off")
    pool.decode()
    units = np.frombuffer(charsmap, "<u4", count=size // 4, offset=4)
    values = units[units >> 31 == 1] & 0x7FFFFFFF
    steps = np.arange(len(units), dtype=np.uint32) ^ ((units >> 10) << ((units & 512) >> 6))
    inner = units >> 31 == 0
    starts = np.frombuffer(pool, np.uint8)[np.minimum(values, len(pool) - 1)]
    if (steps[inner] >= len(units)).any() or (values >= len(pool)).any() or ((starts & 0xC0) == 0x80).any():
        raise ValueError("its table of characters points outside itself")
