"""A text, or two, as a model with a head reads it: token ids between the marks of its vocabulary, and where each stands in the text.

    encoder   [CLS] text [SEP]          [CLS] text [SEP] pair [SEP]      as the tokenizer's own post-processor says
    decoder   <s> text                  <s> text \n pair                  no end token: a head reads the last token of the text

Training, evaluation and use all frame through this one function.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ownlm.documents.clean import well_formed
from ownlm.errors import UserError
from ownlm.tokens.codec import Tokenizer

Offsets = list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The tokens of one text; `offsets` are the characters of each."""

    ids: list[int]
    offsets: Offsets

    def part(self, start: int, stop: int) -> "Piece":
        return Piece(ids=self.ids[start:stop], offsets=self.offsets[start:stop])


@dataclass(frozen=True, slots=True, kw_only=True)
class Framed:
    """`types` tell the two texts apart (0 and 1, where the vocabulary does); the first text's tokens begin at `first`, the second's
    at `second`."""

    ids: list[int]
    types: list[int]
    first: int
    second: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The marks around a text and around a pair: (ids, types) before, between and after."""

    single: tuple[tuple[list[int], list[int]], ...]
    pair: tuple[tuple[list[int], list[int]], ...]
    pair_type: int

    def room(self, limit: int, *, pair: bool) -> int:
        """Tokens of text that fit into `limit`. UserError when none do."""
        marks = sum(len(ids) for ids, _ in (self.pair if pair else self.single))
        if limit <= marks + 1:
            raise UserError(f"a context of {limit} tokens has no room for text.", cure="Raise the context.")
        return limit - marks

    def put(self, text: Piece, pair: Piece | None = None) -> Framed:
        """The ids of what is between the marks."""
        marks = self.single if pair is None else self.pair
        ids, types = [*marks[0][0], *text.ids], [*marks[0][1], *[0] * len(text.ids)]
        if pair is not None:
            ids += [*marks[1][0], *pair.ids]
            types += [*marks[1][1], *[self.pair_type] * len(pair.ids)]
        second = len(ids) - (len(pair.ids) if pair else 0)
        return Framed(ids=[*ids, *marks[-1][0]], types=[*types, *marks[-1][1]], first=len(marks[0][0]), second=second)


def frame_of(tokenizer: Tokenizer, *, encoder: bool) -> Frame:
    """The frame of a vocabulary. A decoder's has nothing after the text."""
    if not encoder:
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        line = tokenizer.encode("\n")
        before = (begin, [0] * len(begin))
        return Frame(single=(before, ([], [])), pair=(before, (line, [0] * len(line)), ([], [])), pair_type=0)
    one, two = (_marks(tokenizer, texts) for texts in (("a",), ("a", "b")))
    if not any(ids for ids, _ in one[0]):  # a tokenizer.json without a post-processor
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        before, end = (begin, [0] * len(begin)), ([tokenizer.eos_id], [0])
        return Frame(single=(before, end), pair=(before, end, end), pair_type=0)
    return Frame(single=tuple(one[0]), pair=tuple(two[0]), pair_type=two[1])


def _marks(tokenizer: Tokenizer, texts: tuple[str, ...]) -> tuple[list[tuple[list[int], list[int]]], int]:
    encoding = tokenizer.backend.encode(texts[0], texts[1] if len(texts) > 1 else None)
    marks: list[tuple[list[int], list[int]]] = [([], []) for _ in range(len(texts) + 1)]
    at, pair_type = 0, 0
    for id, type, owner in zip(encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True):
        if owner is None:
            marks[at][0].append(id)
            marks[at][1].append(type)
        else:
            at, pair_type = owner + 1, type
    return marks, pair_type


def piece(tokenizer: Tokenizer, text: str) -> Piece:
    """The tokens of a text, without marks, and the characters of each: white space before a token is not its own."""
    text = well_formed(text)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    offsets = []
    for start, stop in encoding.offsets:
        while start < stop and text[start].isspace():
            start += 1
        offsets.append((start, stop))
    return Piece(ids=list(encoding.ids), offsets=offsets)


def framed(tokenizer: Tokenizer, frame: Frame, text: str, pair: str | None, limit: int) -> Framed:
    """A text, or two, in at most `limit` tokens; what is too long loses its end, the longer of two first."""
    one = piece(tokenizer, text)
    two = None if pair is None else piece(tokenizer, pair)
    room = frame.room(limit, pair=two is not None)
    if two is None:
        return frame.put(one.part(0, room))
    first = min(len(one.ids), max(room // 2, room - len(two.ids)))
    return frame.put(one.part(0, first), two.part(0, room - first))


def first_tokens(offsets: Offsets, words: Sequence[tuple[int, int]]) -> list[int | None]:
    """The first token of each word, given the characters of both; None for a word that has no token of its own."""
    found: list[int | None] = [None] * len(words)
    at = 0
    for index, (start, stop) in enumerate(offsets):
        if start == stop:
            continue
        while at < len(words) and words[at][1] <= start:
            at += 1
        if at < len(words) and words[at][0] <= start and found[at] is None:
            found[at] = index
    return found


def joined(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Words as one text, a space between them, and the characters of each: joined(["a", "bc"]) == ("a bc", [(0, 1), (2, 4)])."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans
