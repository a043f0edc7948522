"""The key/value cache in pages: a sequence's positions lie in any pages, several sequences may read the same one.

    page table of a row:  [7, 2, 3]      position 40 of it stands in page 2, place 8 (of 32)

The same call as with slots (models/cache.py): each token is written at its place, then sees every position of its sequence up to its
own. What it reads (of a window, just the pages it touches) is gathered from its pages into one piece of memory, so that attention is
the one every model has. Where a page holds a whole sequence, the pages of neighbouring rows are read where they are.
A token at position -1 is padding: it is written into a page that belongs to nobody.
Shapes: L layers, N pages, K key/value heads, s positions of a page, d head width; B rows, T tokens of this call, P pages of a row,
S positions that are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ownlm.models.attention import Visibility, causal, masked

if TYPE_CHECKING:
    from ownlm.models.decoder import DecoderConfig

PIECE_BYTES = 2**28  # keys and values of one layer that are gathered at a time


def position_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
    """What the keys and values of one position take, over all layers."""
    return 2 * config.num_layers * math.prod(config.kv_shape) * dtype.itemsize


class PagedCache:
    """Keys and values in `pages` pages of `page` positions, allocated at once and overwritten in place. A page needs no clearing
    before it is given to another sequence: a token sees only positions up to its own, and those have been written by then."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        pages: int,
        page: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pages, self.page = pages, page
        self.kv_heads, self.head_dim = config.kv_shape
        # The last page is that of padding.
        shape = (config.num_layers, 2, pages + 1, self.kv_heads, page, self.head_dim)
        self.both_L2NKsd = torch.zeros(shape, dtype=dtype, device=device)
        self.piece_pages = max(1, PIECE_BYTES * config.num_layers // (page * position_bytes(config, dtype)))
        self.gathered = self.both_L2NKsd.new_empty(0)

    @property
    def memory_bytes(self) -> int:
        return self.both_L2NKsd.nbytes

    def copy(self, page: int, onto: int) -> None:
        """Make one page hold what another does."""
        self.both_L2NKsd[:, :, onto] = self.both_L2NKsd[:, :, page]

    def address(
        self,
        positions_BT: Tensor,
        pages_BP: Tensor,
        *,
        lengths: Sequence[int] | None = None,
        first: int | None = None,
        long: bool | None = None,
    ) -> PagedAddress:
        """Where this call's tokens go, and what they read. Nothing is asked of the device on the way.

        lengths  positions that each row reads, its tokens included; None: all of its pages
        first    where each row has one page, and these follow one another: the first of them
        long     how positions turn (LongRope); None: as the positions of the call say
        """
        place_BT = positions_BT.clamp(min=0)
        page_BT = torch.where(positions_BT < 0, self.pages, pages_BP.gather(1, place_BT // self.page))
        rows, width = pages_BP.shape
        if lengths is None:
            pieces = [Piece(slice(0, rows), positions_BT, pages_BP, width * self.page)]
        elif first is not None:
            pieces = [Piece(slice(0, rows), positions_BT, pages_BP, max(lengths), rows == 1, first)]
        else:
            pieces = [
                Piece(some, positions_BT[some], pages_BP[some], max(lengths[some]), rows == 1)
                for some in self._together(lengths)
            ]
        return PagedAddress(self, positions_BT, page_BT, place_BT % self.page, tuple(pieces), long)

    def _together(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Which neighbouring rows are gathered together."""
        begin, widest = 0, 0
        for row, length in enumerate(lengths):
            widest = max(widest, -(-length // self.page))
            if row > begin and widest * (row + 1 - begin) > self.piece_pages:
                yield slice(begin, row)
                begin, widest = row, -(-length // self.page)
        yield slice(begin, len(lengths))

    def gather(self, both_2NKsd: Tensor, read_2BKP: Tensor) -> Tensor:
        """(2, B, K, S, d): the pages of keys and values that `read` counts."""
        shape = (*read_2BKP.shape[:3], -1, self.head_dim)
        pages = both_2NKsd.view(-1, self.page, self.head_dim)
        if pages.device.type != "cpu":
            return pages.index_select(0, read_2BKP.flatten()).view(shape)
        # Fresh memory for each layer would cost a CPU more than the copy: the system hands it out page by page.
        size = read_2BKP.numel() * self.page * self.head_dim
        if self.gathered.numel() < size:
            self.gathered = pages.new_empty(size)
        found = self.gathered[:size].view(-1, self.page, self.head_dim)
        return torch.index_select(pages, 0, read_2BKP.flatten(), out=found).view(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What the layers of one window read: `index_2BKP` counts pages through keys and values and their heads; of what they hold, the
    first `length` positions."""

    index_2BKP: Tensor
    length: int
    visibility: Visibility


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Rows of a call that are read together, from pages of `length` positions. `exact`: one row, without padding, whose tokens are the
    last of these. `first`: of rows whose only pages follow one another. `readings` keeps what was worked out of windows."""

    rows: slice
    positions_BT: Tensor
    pages_BP: Tensor
    length: int
    exact: bool = False
    first: int | None = None
    readings: dict[int | None, Reading] = field(default_factory=dict)

    def reading(self, cache: PagedCache, window: int | None) -> Reading:
        """What the layers of a window read, and see."""
        if window not in self.readings:
            self.readings[window] = self._reading(cache, window)
        return self.readings[window]

    def _reading(self, cache: PagedCache, window: int | None) -> Reading:
        width, device, page = self.positions_BT.shape[1], self.positions_BT.device, cache.page
        count = -(-self.length // page)
        begin_B1 = torch.zeros_like(self.positions_BT[:, :1])
        length, begin = self.length, 0
        touched = count if window is None else -(-(window + width - 1) // page) + 1
        if touched < count and self.first is None:
            # From the page of the first position that the first token sees.
            count, length = touched, touched * page
            begin_B1 = (self.positions_BT[:, :1] - (window or 0) + 1).clamp(min=0) // page
            if self.exact:
                begin = max(0, self.length - width - (window or 0) + 1) // page
                length = self.length - begin * page
        number_BP = begin_B1 + torch.arange(count, device=device)
        pages_BP = self.pages_BP.gather(1, number_BP.clamp(max=self.pages_BP.shape[1] - 1))
        half_2 = torch.arange(2, device=device).view(2, 1, 1, 1) * (cache.pages + 1)
        index_2BKP = (half_2 + pages_BP[:, None]) * cache.kv_heads + torch.arange(cache.kv_heads, device=device)[
            :, None
        ]
        # Elsewhere than on a CPU such a mask would be made again in each layer, unless it is the triangle that kernels know.
        if self.exact and (device.type == "cpu" or (width == length and window is None)):
            return Reading(index_2BKP, length, causal(width, length, window))
        key_BS = (number_BP[:, :, None] * page + torch.arange(page, device=device)).flatten(1)[:, :length]
        # Padding sees what the first token of its row sees, so that its softmax has something to sum over.
        own_BT = torch.where(self.positions_BT < 0, self.positions_BT[:, :1], self.positions_BT).clamp(min=0)
        hidden_BTS = key_BS[:, None] > own_BT[:, :, None]
        if window is not None and window < self.length:
            hidden_BTS |= key_BS[:, None] <= own_BT[:, :, None] - window
        return Reading(index_2BKP, length, masked(hidden_BTS))


@dataclass(frozen=True, slots=True, eq=False)
class PagedAddress:
    """A place in pages (`Place`)."""

    cache: PagedCache
    positions_BT: Tensor
    page_BT: Tensor
    place_BT: Tensor
    pieces: tuple[Piece, ...]
    long: bool | None

    def update(
        self, layer: int, k_BTKd: Tensor, v_BTKd: Tensor, window: int | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Visibility]]:
        both_2NKsd = self.cache.both_L2NKsd[layer]
        for whole_NKsd, new_BTKd in zip(both_2NKsd, (k_BTKd, v_BTKd), strict=True):
            whole_NKsd.transpose(1, 2).index_put_((self.page_BT, self.place_BT), new_BTKd)
        for piece in self.pieces:
            reading = piece.reading(self.cache, window)
            if piece.first is not None:
                found = both_2NKsd[:, piece.first : piece.first + len(piece.positions_BT)]
            else:
                found = self.cache.gather(both_2NKsd, reading.index_2BKP)
            keys, values = found[:, :, :, : reading.length]
            yield piece.rows, keys, values, reading.visibility
