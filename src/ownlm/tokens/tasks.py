"""Examples of a task as batches: framed, padded on the right, labelled.

    Labelled ─► ClassBatch    Tagged ─► TagBatch    Asked ─► SpanBatch    Rewritten ─► Seq2SeqBatch

Examples are encoded once. A step's rows are sorted by length before they are cut into micro-batches, so that little is padded;
which rows a step has is as ever a function of its number.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from ownlm.records import Asked, Labelled, Rewritten, Tagged
from ownlm.tokens.batches import UNTRAINED, Batch, Ints, Micro
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.examples import ClassBatch, Made, SpanBatch, TagBatch, padded, seq2seq
from ownlm.tokens.framing import Frame, first_tokens, frame_of, framed, joined, piece

R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row(Generic[R]):
    """An encoded example; `wanted` is what its batch asks for."""

    ids: list[int]
    types: list[int]
    wanted: R


class Examples(Generic[R]):
    """Encoded examples, and how some of them become a batch. `left_out` of them can't be asked within the context."""

    def __init__(
        self, rows: Sequence[Row[R]], collate: Callable[[Sequence[Row[R]]], Micro], *, left_out: int = 0
    ) -> None:
        self.rows, self.collate, self.left_out = rows, collate, left_out

    def batches(self, *, rows: int, micro_rows: int, seed: int) -> Made[Micro]:
        """Batches for training, in a new order every epoch."""
        return _ByLength(self, rows=rows, micro_rows=micro_rows, seed=seed)

    def everything(self, rows: int) -> Iterator[Micro]:
        """Every example once, those of like length together."""
        order = sorted(range(len(self.rows)), key=lambda index: len(self.rows[index].ids))
        for first in range(0, len(order), rows):
            yield self.collate([self.rows[index] for index in order[first : first + rows]])


class _ByLength(Made[Micro]):
    def __init__(self, examples: Examples[Any], *, rows: int, micro_rows: int, seed: int) -> None:
        self.examples, count = examples, len(examples.rows)
        self.order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(count))
        super().__init__(
            lambda numbers: self._collate(self._chosen(numbers)), rows_per_epoch=count, rows=rows, micro_rows=micro_rows
        )

    def _chosen(self, numbers: Ints) -> list[int]:
        count = self.rows_per_epoch
        return [int(self.order(int(number) // count)[number % count]) for number in numbers]

    def _collate(self, indices: Sequence[int]) -> Micro:
        return self.examples.collate([self.examples.rows[index] for index in indices])

    def step(self, step: int) -> list[Micro]:
        numbers = np.arange(step * self.num_rows, (step + 1) * self.num_rows)
        chosen = sorted(self._chosen(numbers), key=lambda index: len(self.examples.rows[index].ids))
        return [
            self._collate(chosen[first : first + self.micro_rows]) for first in range(0, len(chosen), self.micro_rows)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What turns texts into rows: the tokenizer, its frame, and the longest row. `types`: whether the model tells two texts apart;
    `start_id` begins what a decoder reads (encoder-decoders)."""

    tokenizer: Tokenizer
    context: int
    encoder: bool
    types: bool = False
    start_id: int | None = None

    @property
    def frame(self) -> Frame:
        return frame_of(self.tokenizer, encoder=self.encoder)

    def padded(self, rows: Sequence[Row[Any]]) -> dict[str, Any]:
        """tokens_BT, mask_BT and types_BT of rows."""
        tokens_BT, mask_BT = padded([row.ids for row in rows], self.tokenizer.pad_id)
        types_BT = padded([row.types for row in rows], 0)[0] if self.types else None
        return {"tokens_BT": tokens_BT, "mask_BT": None if bool(mask_BT.all()) else mask_BT, "types_BT": types_BT}


def classification(examples: Sequence[Labelled], labels: Sequence[str], reader: Reader) -> Examples[Any]:
    """Texts with the number of their label; of a label that isn't known, the text is left out."""
    number = {label: index for index, label in enumerate(labels)}
    frame = reader.frame
    rows = []
    for one in examples:
        if one.label in number:
            found = framed(reader.tokenizer, frame, one.text, one.pair, reader.context)
            rows.append(Row(ids=found.ids, types=found.types, wanted=number[one.label]))

    def collate(some: Sequence[Row[int]]) -> ClassBatch:
        labels_B = torch.tensor([row.wanted for row in some])
        return ClassBatch(**reader.padded(some), labels_B=labels_B, num_trained=len(some))

    return Examples(rows, collate, left_out=len(examples) - len(rows))


def tokens(examples: Sequence[Tagged], labels: Sequence[str], reader: Reader) -> Examples[Any]:
    """Sentences; the first token of each word has the number of its tag, the others none."""
    number = {label: index for index, label in enumerate(labels)}
    frame = reader.frame
    room = frame.room(reader.context, pair=False)
    rows, left_out = [], 0
    for one in examples:
        text, spans = joined(one.words)
        cut = piece(reader.tokenizer, text).part(0, room)
        found = frame.put(cut)
        wanted = [UNTRAINED] * len(found.ids)
        for place, tag in zip(first_tokens(cut.offsets, spans), one.tags, strict=True):
            if place is not None:
                wanted[found.first + place] = number.get(tag, UNTRAINED)
        if max(wanted) < 0:
            left_out += 1
        else:
            rows.append(Row(ids=found.ids, types=found.types, wanted=wanted))

    def collate(some: Sequence[Row[list[int]]]) -> TagBatch:
        labels_BT, _ = padded([row.wanted for row in some], UNTRAINED)
        trained = int((labels_BT != UNTRAINED).sum())
        return TagBatch(**reader.padded(some), labels_BT=labels_BT, num_trained=trained)

    return Examples(rows, collate, left_out=left_out)


def answer(examples: Sequence[Asked], reader: Reader) -> Examples[Any]:
    """Questions with their contexts, of which a part around the answer is shown where all is too long."""
    frame = reader.frame
    room = frame.room(reader.context, pair=True)
    rows = []
    for one in examples:
        question, context = piece(reader.tokenizer, one.question), piece(reader.tokenizer, one.context)
        question = question.part(0, room // 2)
        stop = one.start + len(one.answers[0])
        inside = [at for at, (a, b) in enumerate(context.offsets) if a < stop and b > one.start and a < b]
        width = room - len(question.ids)
        if not inside or inside[-1] - inside[0] >= width:
            continue
        middle = (inside[0] + inside[-1]) // 2
        begin = max(0, min(middle - width // 2, len(context.ids) - width))
        found = frame.put(question, context.part(begin, begin + width))
        place = found.second - begin
        rows.append(Row(ids=found.ids, types=found.types, wanted=(inside[0] + place, inside[-1] + place)))

    def collate(some: Sequence[Row[tuple[int, int]]]) -> SpanBatch:
        starts_B, ends_B = torch.tensor([row.wanted for row in some]).unbind(-1)
        return SpanBatch(**reader.padded(some), starts_B=starts_B, ends_B=ends_B, num_trained=len(some))

    return Examples(rows, collate, left_out=len(examples) - len(rows))


def source_ids(tokenizer: Tokenizer, text: str, room: int, *, decoder: bool) -> list[int]:
    """At most `room` tokens of a text that is to be rewritten, and what tells the model to begin: a decoder a line end, an
    encoder-decoder the end token."""
    end = tokenizer.encode("\n") if decoder else [tokenizer.eos_id]
    return [*tokenizer.document(text)[:-1][: max(0, room - len(end))], *end]


def rewriting(examples: Sequence[Rewritten], reader: Reader, prefix: str) -> Examples[Any]:
    """Sources after a prefix, and targets with their end token; what is longer than the context is cut. A decoder goes on with the
    target after the source and a line end."""
    tokenizer, limit = reader.tokenizer, reader.context
    decoder = reader.start_id is None
    rows = []
    for one in examples:
        target = [*tokenizer.encode(one.target)[: limit // 2], tokenizer.eos_id]
        source = source_ids(tokenizer, prefix + one.source, limit - len(target) * decoder, decoder=decoder)
        rows.append(Row(ids=source, types=[], wanted=target))

    def collate(some: Sequence[Row[list[int]]]) -> Micro:
        inputs, wanted = [row.ids for row in some], [row.wanted for row in some]
        if reader.start_id is not None:
            return seq2seq(inputs, wanted, start_id=reader.start_id, pad_id=tokenizer.pad_id)
        both = [[*a, *b] for a, b in zip(inputs, wanted, strict=True)]
        tokens_BT, _ = padded([row[:-1] for row in both], tokenizer.pad_id)
        targets_BT, _ = padded(
            [[*[UNTRAINED] * (len(a) - 1), *b] for a, b in zip(inputs, wanted, strict=True)], UNTRAINED
        )
        return Batch(
            tokens_BT=tokens_BT,
            targets_BT=targets_BT,
            positions_BT=None,
            documents_BT=None,
            num_trained=sum(map(len, wanted)),
        )

    return Examples(rows, collate)
