"""Batches of every objective but the plain next token, and the classes that make them for a step.

    text rows ─► corrupt.py ─► MaskedBatch | Seq2SeqBatch | PermutedBatch          pretraining
    examples ──► collate ────► ClassBatch | TagBatch | SpanBatch | Seq2SeqBatch | PairBatch      tasks

As in batches.py a step's batches are a pure function of its number, so that a run resumes exactly and nothing is saved.

Letters: B rows, T tokens, S tokens of an encoder's input, K predicted tokens of a row, C channels, H height, W width.
Tensors are on the CPU; `mask_…` is True for tokens and False for padding, and None where there is no padding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ownlm.errors import UserError
from ownlm.tokens.batches import UNTRAINED, DocumentRows, Ints, Micro
from ownlm.tokens.corrupt import (
    Marks,
    MaskedLM,
    PermutationLM,
    SpanCorruption,
    draw,
    factorise,
    hide_spans,
    mask_tokens,
    span_counts,
    span_text_length,
    splice,
)
from ownlm.tokens.shards import Shard

B = TypeVar("B", bound=Micro)
Corruption = MaskedLM | SpanCorruption | PermutationLM
VALIDATION_SEED = 0x5EED  # held-out text is hidden in the same way in every run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MaskedBatch:
    """Rows with hidden tokens; `targets_BT` holds the ids at the places that are asked for and -100 elsewhere."""

    tokens_BT: Tensor
    targets_BT: Tensor
    mask_BT: Tensor | None = None
    types_BT: Tensor | None = None
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BT.numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seq2SeqBatch:
    """Inputs of an encoder, and of a decoder that writes `targets_BT` (-100: padding) after reading `decoder_tokens_BT`."""

    tokens_BS: Tensor
    decoder_tokens_BT: Tensor
    targets_BT: Tensor
    mask_BS: Tensor | None = None
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BS.numel() + self.targets_BT.numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PermutedBatch:
    """Rows with a factorisation order: place i does not see place j where `unseen_BTT`; the ids `targets_BK` stand at `places_BK`."""

    tokens_BT: Tensor
    unseen_BTT: Tensor
    places_BK: Tensor
    targets_BK: Tensor
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BT.numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairBatch:
    """Texts, padded behind their end token, and the images that belong to them. Each pair is told from all others of its batch,
    so a step is one batch."""

    tokens_BT: Tensor
    pixels_BCHW: Tensor
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BT.numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClassBatch:
    """Texts (or pairs of texts, told apart by `types_BT`) with a class each; where a head has several labels for a text or
    says numbers, `labels_B` is (B, L)."""

    tokens_BT: Tensor
    labels_B: Tensor
    mask_BT: Tensor | None = None
    types_BT: Tensor | None = None
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BT.numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TagBatch:
    """Texts with a class for each token; -100 where a token has none (the later pieces of a word)."""

    tokens_BT: Tensor
    labels_BT: Tensor
    mask_BT: Tensor | None = None
    types_BT: Tensor | None = None
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BT.numel()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SpanBatch:
    """Questions with their texts, and the first and the last token of the answer."""

    tokens_BT: Tensor
    starts_B: Tensor
    ends_B: Tensor
    mask_BT: Tensor | None = None
    types_BT: Tensor | None = None
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BT.numel()


class Made(Generic[B]):
    """Batches by a function: `make(numbers)` gives the batch of these rows, counted over all epochs."""

    def __init__(
        self, make: Callable[[Ints], B], *, rows_per_epoch: int, rows: int, micro_rows: int | None = None
    ) -> None:
        self.make, self.rows_per_epoch, self.num_rows, self.micro_rows = make, rows_per_epoch, rows, micro_rows or rows

    @property
    def steps_per_epoch(self) -> float:
        return self.rows_per_epoch / self.num_rows

    def step(self, step: int) -> list[B]:
        """The micro-batches of a step."""
        numbers = np.arange(step * self.num_rows, (step + 1) * self.num_rows)
        return [
            self.make(numbers[first : first + self.micro_rows]) for first in range(0, self.num_rows, self.micro_rows)
        ]


def shuffled(
    collate: Callable[[Ints], B], count: int, *, rows: int, micro_rows: int | None = None, seed: int
) -> Made[B]:
    """Batches of `count` examples in a new order every epoch; `collate(indices)` makes one of them."""
    order = lru_cache(maxsize=2)(lambda epoch: np.random.default_rng([seed, epoch]).permutation(count))

    def make(numbers: Ints) -> B:
        return collate(np.asarray([order(int(number) // count)[number % count] for number in numbers]))

    return Made(make, rows_per_epoch=count, rows=rows, micro_rows=micro_rows)


def corrupted(
    shard: Shard,
    settings: Corruption,
    marks: Marks,
    *,
    context: int,
    rows: int,
    micro_rows: int | None = None,
    seed: int,
    start_id: int | None = None,
) -> Made[Micro]:
    """Batches for pretraining on a shard: rows of a stream of shuffled documents, hidden anew every epoch.

    `start_id` begins what the decoder reads (span corruption). Raises UserError when the vocabulary lacks what is needed.
    """
    check(settings, marks, context)
    source = DocumentRows(shard, text_length(settings, marks, context), seed=seed)

    def make(numbers: Ints) -> Micro:
        return hide(source.rows(numbers).tokens, numbers, settings, marks, seed=seed, start_id=start_id)

    return Made(make, rows_per_epoch=source.rows_per_epoch, rows=rows, micro_rows=micro_rows)


def validation_corrupted(
    shard: Shard, settings: Corruption, marks: Marks, *, context: int, rows: int, start_id: int | None = None
) -> Iterator[Micro]:
    """All whole rows of a shard in the order of the file, hidden in the same way each time; less than a row gives none."""
    length = text_length(settings, marks, context)
    count = len(shard.ids) // length
    for first in range(0, count, rows):
        numbers = np.arange(first, min(first + rows, count))
        ids = np.asarray(shard.ids[first * length : (numbers[-1] + 1) * length], np.int64).reshape(len(numbers), length)
        yield hide(ids, numbers, settings, marks, seed=VALIDATION_SEED, start_id=start_id)


def text_length(settings: Corruption, marks: Marks, context: int) -> int:
    """Tokens of text in a row, so that what the model reads has `context` tokens at most."""
    if isinstance(settings, SpanCorruption):
        return span_text_length(context, settings)
    return context - len(marks.before) - len(marks.after)


def check(settings: Corruption, marks: Marks, context: int) -> None:
    """UserError: the vocabulary has no mask or too few sentinels, or a row no room for text."""
    if isinstance(settings, MaskedLM) and marks.mask_id is None:
        raise UserError(
            "the tokenizer has no mask token.", cure='Train it with frame="bert", or name a mask_token in its config.'
        )
    length = text_length(settings, marks, context)
    if length < 2:
        raise UserError(f"a context of {context} has no room for text.", cure="Raise the context.")
    if isinstance(settings, SpanCorruption) and (needed := span_counts(length, settings)[1] + 1) > len(marks.sentinels):
        raise UserError(
            f"rows of {context} tokens need {needed} sentinels and the tokenizer has {len(marks.sentinels)}.",
            cure='Lower the context, raise mean_span, or train the tokenizer with frame="t5".',
        )


def hide(
    ids_BT: Ints,
    numbers: Sequence[int] | Ints,
    settings: Corruption,
    marks: Marks,
    *,
    seed: int,
    start_id: int | None = None,
) -> Micro:
    """The batch that hides something of each row of text; `numbers` name the rows, and with the seed decide what is hidden."""
    draws = [draw(seed, int(number)) for number in numbers]
    if isinstance(settings, SpanCorruption):
        assert start_id is not None, "a decoder needs a token to start from"
        hidden = [hide_spans(ids_BT.shape[1], random, settings) for random in draws]
        end = [marks.eos_id]
        inputs = [[*splice(ids, flags, marks.sentinels), *end] for ids, flags in zip(ids_BT, hidden, strict=True)]
        targets = [[*splice(ids, ~flags, marks.sentinels), *end] for ids, flags in zip(ids_BT, hidden, strict=True)]
        return seq2seq(inputs, targets, start_id=start_id, pad_id=marks.pad_id)
    before, after = ([np.full((len(ids_BT), 1), id) for id in side] for side in (marks.before, marks.after))
    rows = np.concatenate([*before, ids_BT, *after], axis=1).astype(np.int64)
    if isinstance(settings, MaskedLM):
        pairs = [mask_tokens(row, random, settings, marks) for row, random in zip(rows, draws, strict=True)]
        tokens, asked = (np.stack(side) for side in zip(*pairs, strict=True))
        return MaskedBatch(
            tokens_BT=torch.from_numpy(tokens),
            targets_BT=torch.from_numpy(asked),
            num_trained=int((asked != UNTRAINED).sum()),
        )
    able = np.arange(len(marks.before), len(marks.before) + ids_BT.shape[1])
    count = max(1, round(settings.share * len(able)))
    orders = [factorise(able, rows.shape[1], count, random, settings.max_span) for random in draws]
    places = np.stack([places for places, _ in orders])
    return PermutedBatch(
        tokens_BT=torch.from_numpy(rows),
        unseen_BTT=torch.from_numpy(np.stack([unseen for _, unseen in orders])),
        places_BK=torch.from_numpy(places),
        targets_BK=torch.from_numpy(np.take_along_axis(rows, places, axis=1)),
        num_trained=places.size,
    )


def seq2seq(
    inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], *, start_id: int, pad_id: int
) -> Seq2SeqBatch:
    """Padded inputs and targets; the decoder reads the start token and all targets but the last."""
    tokens, mask = padded(inputs, pad_id)
    decoder, _ = padded([[start_id, *row[:-1]] for row in targets], pad_id)
    wanted, _ = padded(targets, UNTRAINED)
    return Seq2SeqBatch(
        tokens_BS=tokens,
        decoder_tokens_BT=decoder,
        targets_BT=wanted,
        mask_BS=None if bool(mask.all()) else mask,
        num_trained=int((wanted != UNTRAINED).sum()),
    )


def padded(rows: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """(ids, mask) of rows of unequal length: padded_BT on the right with `fill`, and True where there is a token."""
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), fill, np.int64), np.zeros((len(rows), width), np.bool_)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = True
    return torch.from_numpy(ids), torch.from_numpy(mask)
