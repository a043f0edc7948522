"""Batches: rows of `context` tokens, packed, in an order that is a pure function of (seed, step).

    documents      A A A e B B e C C | C C e D D D D e E      a stream of shuffled documents, cut into rows
    conversations  p p a a q q a . . | p p p a a a a . .      whole ones, best fit; only answers (a) are targets

Nothing has to be saved or replayed for an exact resume: `Batches.step(n)` is the same in every process. Each row's target is
the next token. With a document mask a document attends to itself only; the end token before it is its first input, as BOS
is elsewhere, so that every token of the stream is a target once and no loss leaks between documents.

Letters: B rows, T tokens of a row.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ownlm.errors import UserError
from ownlm.records import Conversation
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.shards import Shard

UNTRAINED = -100  # torch's ignore_index
Ints = NDArray[np.int64]


class Micro(Protocol):
    """What the loop asks of a micro-batch, whose other fields are tensors and None: the targets that count towards the loss
    of a step, and the tokens that were read."""

    @property
    def num_trained(self) -> int: ...

    @property
    def num_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """A micro-batch, int64 on the CPU. `targets_BT` is -100 where nothing is trained; `documents_BT` numbers the blocks of
    the block-diagonal mask within a row and `positions_BT` counts from 0 in each; both are None for plain causal rows.
    `num_trained` targets count towards the loss."""

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None
    documents_BT: Tensor | None
    num_trained: int

    @property
    def num_tokens(self) -> int:
        return self.tokens_BT.numel()


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The arrays of a batch before they become tensors; all (B, T)."""

    tokens: Ints
    targets: Ints
    positions: Ints
    documents: Ints


class Source(Protocol):
    """Where rows come from: an endless sequence of rows, any of which can be asked for."""

    masked: bool
    rows_per_epoch: int

    def rows(self, numbers: Ints) -> Rows:
        """The rows of these numbers, counted over all epochs."""


class DocumentRows:
    """Rows of a shard. Each epoch shuffles documents, moves the cuts between rows, and shuffles rows."""

    def __init__(self, shard: Shard, context: int, *, seed: int, document_mask: bool = False) -> None:
        if len(shard.ids) <= context:
            raise UserError(
                f"the documents have {len(shard.ids)} tokens, too few for one row of {context}.",
                cure="Add documents or lower the context.",
            )
        self.shard, self.context, self.seed, self.masked = shard, context, seed, document_mask
        self.rows_per_epoch = len(shard.ids) // context
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """(documents in order, where each ends up in the stream, where each row starts) of an epoch."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.shard))
        # The stream is a ring: repeat its beginning so that a row may run over the end.
        lengths = np.diff(self.shard.starts)[order]
        repeated = int(np.searchsorted(np.cumsum(lengths), 2 * self.context + 1)) + 1
        order = np.concatenate([order, order[:repeated]])
        placed = np.concatenate([[0], np.cumsum(np.diff(self.shard.starts)[order])])
        first = random.integers(self.context)
        return order, placed, first + self.context * random.permutation(self.rows_per_epoch)

    def rows(self, numbers: Ints) -> Rows:
        parts = []
        for epoch in np.unique(numbers // self.rows_per_epoch):
            order, placed, starts = self._epoch(int(epoch))
            mine = numbers[numbers // self.rows_per_epoch == epoch] % self.rows_per_epoch
            parts.append(_cut(self.shard, order, placed, starts[mine], self.context, self.masked))
        return parts[0] if len(parts) == 1 else _stack(parts)


class ConversationRows:
    """Rows of whole conversations, packed once by best fit; each epoch shuffles the rows.

    `too_long` conversations didn't fit into a row and `untrained` ones have no assistant turn: both are left out, counted.
    `fill` is the share of the rows that conversations take.
    """

    masked = True

    def __init__(self, conversations: Iterable[Conversation], tokenizer: Tokenizer, context: int, *, seed: int) -> None:
        self.context, self.seed, self.pad_id = context, seed, tokenizer.pad_id
        self.too_long = self.untrained = self.longest = 0
        ids: list[NDArray[np.int32]] = []
        trained: list[NDArray[np.bool_]] = []
        for conversation in conversations:
            tokens, mask = tokenizer.chat(conversation.messages)
            if True not in mask:
                self.untrained += 1
                continue
            size = len(mask) - mask[::-1].index(True)  # what follows the last answer teaches nothing
            self.longest = max(self.longest, size - 1)
            if size - 1 > context:
                self.too_long += 1
                continue
            ids.append(np.asarray(tokens[:size], dtype=np.int32))
            trained.append(np.asarray(mask[:size], dtype=np.bool_))
        if not ids:
            raise UserError(
                f"no conversation can be trained on: {self.too_long} are longer than the context of {context} tokens (the "
                f"longest needs {self.longest}), {self.untrained} have no assistant turn.",
                cure="Raise the context or bring other conversations.",
            )
        self._ids, self._trained = np.concatenate(ids), np.concatenate(trained)
        self._starts = np.cumsum([0, *map(len, ids)])
        inputs = np.diff(self._starts) - 1  # the last token of a conversation is only ever a target
        self._row_of = best_fit(inputs[order := np.random.default_rng(seed).permutation(len(ids))], context)
        # Conversations grouped by row: members[bounds[r]:bounds[r + 1]].
        by_row = np.argsort(self._row_of, kind="stable")
        self._members = order[by_row]
        self.rows_per_epoch = int(self._row_of.max()) + 1
        self._bounds = np.searchsorted(self._row_of[by_row], np.arange(self.rows_per_epoch + 1))
        self.num_conversations = len(ids)
        self.num_trained = int(self._trained.sum())
        self.fill = float(inputs.sum()) / (self.rows_per_epoch * context)
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> Ints:
        return np.random.default_rng([self.seed, epoch]).permutation(self.rows_per_epoch)

    def rows(self, numbers: Ints) -> Rows:
        chosen = [int(self._epoch(int(n) // self.rows_per_epoch)[int(n) % self.rows_per_epoch]) for n in numbers]
        return self.packed(np.asarray(chosen))

    def packed(self, rows: Ints) -> Rows:
        """The packed rows of these indices, in no shuffled order."""
        counts = self._bounds[rows + 1] - self._bounds[rows]
        members = self._members[_ranges(self._bounds[rows], counts)]
        lengths = self._starts[members + 1] - self._starts[members] - 1
        row = np.repeat(np.arange(len(rows)), counts)
        ends = np.cumsum(lengths)
        before_row = np.concatenate([[0], ends])[np.concatenate([[0], np.cumsum(counts)[:-1]])]
        column = ends - lengths - before_row[row]  # where each conversation begins in its row
        at = np.repeat(row * self.context + column - (ends - lengths), lengths) + np.arange(ends[-1])
        source = _ranges(self._starts[members], lengths)
        shape = len(rows), self.context
        tokens, targets = np.full(shape, self.pad_id, np.int64), np.full(shape, UNTRAINED, np.int64)
        positions, documents = np.zeros(shape, np.int64), np.empty(shape, np.int64)
        documents[:] = counts[:, None]  # padding is a block of its own
        tokens.flat[at] = self._ids[source]
        targets.flat[at] = np.where(self._trained[source + 1], self._ids[source + 1], UNTRAINED)
        positions.flat[at] = _ranges(np.zeros_like(lengths), lengths)
        documents.flat[at] = np.repeat(_ranges(np.zeros_like(counts), counts), lengths)
        return Rows(tokens, targets, positions, documents)


class Batches:
    """The training data of a run: `step(n)` gives the micro-batches of optimizer step n, always the same ones.

    `document_share` of the rows come from `documents`, spread evenly over the steps.
    """

    def __init__(
        self,
        source: Source,
        *,
        rows: int,
        micro_rows: int | None = None,
        documents: DocumentRows | None = None,
        document_share: float = 0.0,
    ) -> None:
        assert 0 <= document_share < 1, document_share
        assert document_share == 0 or documents is not None, "document_share without documents"
        self.source, self.documents, self.document_share = source, documents, document_share
        self.num_rows, self.micro_rows = rows, micro_rows or rows
        self.masked = source.masked or (document_share > 0 and documents is not None and documents.masked)

    @property
    def steps_per_epoch(self) -> float:
        """How many steps see every row of the main source once."""
        return self.source.rows_per_epoch / (self.num_rows * (1 - self.document_share))

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of a step; their `num_trained` summed is the weight of the whole step."""
        first, last = (int(n * self.num_rows * self.document_share) for n in (step, step + 1))
        parts = [self.source.rows(np.arange(step * self.num_rows - first, (step + 1) * self.num_rows - last))]
        if last > first and self.documents is not None:
            parts.append(self.documents.rows(np.arange(first, last)))
        return list(_micro_batches(_stack(parts), self.micro_rows, self.masked))


def validation_documents(shard: Shard, context: int, *, rows: int, document_mask: bool = False) -> Iterator[Batch]:
    """Every token of the shard as a target exactly once, in the order of the file: losses summed over these batches and
    divided by `shard.bytes` are nats per byte."""
    count = -(-len(shard.ids) // context)
    everything = np.arange(len(shard))
    for first in range(0, count, rows):
        starts = context * np.arange(first, min(first + rows, count)) - 1
        yield from _micro_batches(
            _cut(shard, everything, shard.starts, starts, context, document_mask), rows, document_mask
        )


def validation_conversations(source: ConversationRows, *, rows: int) -> Iterator[Batch]:
    """Every conversation once, in a fixed order."""
    for first in range(0, source.rows_per_epoch, rows):
        numbers = np.arange(first, min(first + rows, source.rows_per_epoch))
        yield from _micro_batches(source.packed(numbers), rows, masked=True)


def best_fit(lengths: Ints, capacity: int) -> Ints:
    """The row of each item, in the order given: the fullest open row that still has room for it.

    best_fit([5, 4, 3, 2], 8) == [0, 1, 0, 1]
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    room: list[tuple[int, int]] = []  # (space left, row), sorted
    count = 0
    for item, length in enumerate(lengths.tolist()):
        at = bisect_left(room, (length, -1))
        left, row = room.pop(at) if at < len(room) else (capacity, count)
        count = max(count, row + 1)
        rows[item] = row
        if left > length:
            insort(room, (left - length, row))
    return rows


def _cut(shard: Shard, order: Ints, placed: Ints, starts: Ints, context: int, masked: bool) -> Rows:
    """Rows of a stream of documents. `order[k]` lies at [placed[k], placed[k + 1]) of the stream; a row holds the tokens
    from its start on, and its targets one further. A start of -1 puts an end token before the stream; past its end is padding."""
    ends = np.minimum(starts + context + 1, placed[-1])
    begins = np.maximum(starts, 0)
    first = np.searchsorted(placed, begins, side="right") - 1
    last = np.searchsorted(placed, ends, side="left") - 1
    counts = last - first + 1
    row = np.repeat(np.arange(len(starts)), counts)
    piece = _ranges(first, counts)  # one entry for each document that a row touches
    piece_begin = np.maximum(placed[piece], begins[row])
    lengths = np.minimum(placed[piece + 1], ends[row]) - piece_begin
    offset = shard.starts[order[piece]] + piece_begin - placed[piece]
    column = row * (context + 1) + piece_begin - starts[row]
    at = _ranges(column, lengths)
    stream = np.full((len(starts), context + 1), shard.eos_id, np.int64)
    stream.flat[at] = shard.ids[_ranges(offset, lengths)]
    columns = np.arange(context)
    targets = np.where(columns < (ends - starts - 1)[:, None], stream[:, 1:], UNTRAINED)
    if not masked:
        return Rows(stream[:, :-1], targets, np.broadcast_to(columns, targets.shape), np.zeros_like(targets))
    begins_here = np.zeros(stream.shape, dtype=np.bool_)
    # The first token of a document begins a block; without BOS the end token before it does.
    begins_here.flat[column[piece_begin == placed[piece]]] = True
    opened = begins_here[:, :-1] if shard.bos_id is not None else begins_here[:, 1:]
    documents = np.cumsum(opened, axis=1, dtype=np.int64)
    latest = np.maximum.accumulate(np.where(opened, columns, 0), axis=1)
    if shard.bos_id is not None:
        targets = np.where(begins_here[:, 1:], UNTRAINED, targets)  # the next document's BOS is nothing to learn
    return Rows(stream[:, :-1], targets, columns - latest, documents)


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """_ranges([5, 0], [2, 3]) == [5, 6, 0, 1, 2]"""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def _stack(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("tokens", "targets", "positions", "documents")
        )
    )


def _micro_batches(rows: Rows, micro_rows: int, masked: bool) -> Iterator[Batch]:
    for first in range(0, len(rows.tokens), micro_rows):
        part = slice(first, first + micro_rows)
        yield Batch(
            tokens_BT=torch.from_numpy(np.ascontiguousarray(rows.tokens[part])),
            targets_BT=torch.from_numpy(np.ascontiguousarray(rows.targets[part])),
            positions_BT=torch.from_numpy(np.ascontiguousarray(rows.positions[part])) if masked else None,
            documents_BT=torch.from_numpy(np.ascontiguousarray(rows.documents[part])) if masked else None,
            num_trained=int((rows.targets[part] != UNTRAINED).sum()),
        )
