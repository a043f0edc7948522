"""The key/value cache: what earlier tokens left behind, addressed as (slot, position).

A slot is one sequence. Decoding, batched decoding of different lengths and chunked prefill are the same call,
`model(tokens_BT, place=cache.address(positions_BT, slots_B))`: each token is written at its slot and position, then sees
every position of its slot up to its own. A token at position -1 is padding: it is not kept, and nobody sees it.
Shapes: L layers, N slots, K key/value heads, S positions, d head width; B rows, T tokens of this call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ownlm.models.attention import Visibility, causal, masked

if TYPE_CHECKING:
    from ownlm.models.decoder import DecoderConfig
    from ownlm.models.encoder_decoder import EncoderDecoderConfig


class Place(Protocol):
    """Where the tokens of one call go in a cache, and what they read of it: worked out once for all layers. `long`: how their positions
    turn (LongRope); None: as the positions say. generate/paged.py has another."""

    @property
    def positions_BT(self) -> Tensor: ...
    @property
    def long(self) -> bool | None: ...
    def update(
        self, layer: int, k_BTKd: Tensor, v_BTKd: Tensor, window: int | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Visibility]]:
        """Write these tokens' keys and values; then, some rows at a time: which, the keys and values (B, K, S, d) that they read, and
        what they see of those. Use one before asking for the next."""
        ...


class KVCache:
    """Keys and values of `slots` sequences of up to `max_tokens` tokens, allocated at once and overwritten in place.

    A slot needs no clearing before it is given to another sequence: a token sees only positions up to its own, and
    those have been written again by then.
    """

    def __init__(
        self,
        config: DecoderConfig | EncoderDecoderConfig,
        *,
        slots: int,
        max_tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        kv_heads, head_dim = config.kv_shape
        # One position more than anybody may see: index -1 lands there, so padding needs no branch.
        shape = (config.num_layers, slots, kv_heads, max_tokens + 1, head_dim)
        self.slots, self.max_tokens = slots, max_tokens
        self.keys_LNKSd = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LNKSd = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def memory_bytes(self) -> int:
        return 2 * self.keys_LNKSd.nbytes

    def address(self, positions_BT: Tensor, slots_B: Tensor | None = None) -> Address:
        """Where this call's tokens go; slots None means that row b is slot b."""
        rows, width = positions_BT.shape
        length = int(positions_BT.max()) + 1
        assert length <= self.max_tokens, f"position {length - 1} in a cache of {self.max_tokens}"
        first, consecutive = 0, True
        if slots_B is not None:
            numbers = slots_B.tolist()
            first, consecutive = numbers[0], numbers == list(range(numbers[0], numbers[0] + rows))
        assert first + rows <= self.slots or not consecutive, f"{rows} rows from slot {first} on in {self.slots} slots"
        slots_B = torch.arange(first, first + rows, device=positions_BT.device) if slots_B is None else slots_B
        read = slice(first, first + rows) if consecutive else slots_B
        last_T = torch.arange(length - width, length, device=positions_BT.device)
        aligned = length >= width and bool((positions_BT == last_T).all())
        return Address(self, positions_BT, slots_B[:, None], read, max(length, 1), aligned)

    def reorder(self, slots_B: Tensor, length: int) -> None:
        """Slot b becomes a copy of what slot slots_B[b] was, as far as its first `length` positions (beam search)."""
        for whole_LNKSd in (self.keys_LNKSd, self.values_LNKSd):
            whole_LNKSd[:, : len(slots_B), :, :length] = whole_LNKSd[:, slots_B, :, :length]


@dataclass(frozen=True, slots=True, eq=False)
class Address:
    """A place in slots. `aligned`: all rows have the same positions, which are their last."""

    cache: KVCache
    positions_BT: Tensor
    slots_B1: Tensor
    read: slice | Tensor
    length: int
    aligned: bool
    long: None = None
    seen: dict[int | None, Visibility] = field(default_factory=dict)

    def update(
        self, layer: int, k_BTKd: Tensor, v_BTKd: Tensor, window: int | None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Visibility]]:
        keys, values = self.cache.keys_LNKSd[layer], self.cache.values_LNKSd[layer]
        keys.transpose(1, 2).index_put_((self.slots_B1, self.positions_BT), k_BTKd)
        values.transpose(1, 2).index_put_((self.slots_B1, self.positions_BT), v_BTKd)
        if window not in self.seen:
            self.seen[window] = self.visibility(window)
        yield (
            slice(None),
            keys[self.read][:, :, : self.length],
            values[self.read][:, :, : self.length],
            self.seen[window],
        )

    def visibility(self, window: int | None) -> Visibility:
        """What these tokens see: their slot's positions up to their own, the last `window` of them."""
        if self.aligned:
            return causal(self.positions_BT.shape[1], self.length, window)
        keys = torch.arange(self.length, device=self.positions_BT.device)
        # Padding sees position 0, so that its softmax has something to sum over.
        own_BT1 = self.positions_BT.clamp(min=0)[:, :, None]
        hidden_BTS = keys > own_BT1
        if window is not None and window < self.length:
            hidden_BTS |= keys <= own_BT1 - window
        return masked(hidden_BTS)
