"""The key/value cache: what earlier tokens left behind, addressed as (slot, position).

A slot is one sequence. Decoding, batched decoding of different lengths and chunked prefill are the same call,
`model(tokens_BT, positions_BT=…, cache=…, slots=…)`: each token is written at its slot and position, then sees every
position of its slot up to its own. A token at position -1 is padding: it is not kept, and nobody sees it.
Shapes: L layers, N slots, K key/value heads, S positions, d head width; B rows, T tokens of this call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ownlm.models.attention import Visibility, causal, masked

if TYPE_CHECKING:
    from ownlm.models.decoder import DecoderConfig
    from ownlm.models.encoder_decoder import EncoderDecoderConfig


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

    def address(self, positions_BT: Tensor, slots_B: Tensor | None) -> Address:
        """Where this call's tokens go; slots None means that row b is slot b."""
        rows = len(positions_BT)
        length = int(positions_BT.max()) + 1
        assert length <= self.max_tokens, f"position {length - 1} in a cache of {self.max_tokens}"
        first, consecutive = 0, True
        if slots_B is not None:
            numbers = slots_B.tolist()
            first, consecutive = numbers[0], numbers == list(range(numbers[0], numbers[0] + rows))
        assert first + rows <= self.slots or not consecutive, f"{rows} rows from slot {first} on in {self.slots} slots"
        slots_B = torch.arange(first, first + rows, device=positions_BT.device) if slots_B is None else slots_B
        read = slice(first, first + rows) if consecutive else slots_B
        return Address(slots_B[:, None], positions_BT, read, max(length, 1))

    def update(self, layer: int, address: Address, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor]:
        """Write these tokens' keys and values; return all (B, K, S, d) they may see, a view if slots are in a row."""
        at = (address.slots_B1, address.positions_BT)
        keys, values = self.keys_LNKSd[layer], self.values_LNKSd[layer]
        keys.transpose(1, 2).index_put_(at, k_BTKd)
        values.transpose(1, 2).index_put_(at, v_BTKd)
        return keys[address.read][:, :, : address.length], values[address.read][:, :, : address.length]

    def reorder(self, slots_B: Tensor, length: int) -> None:
        """Slot b becomes a copy of what slot slots_B[b] was, as far as its first `length` positions (beam search)."""
        for whole_LNKSd in (self.keys_LNKSd, self.values_LNKSd):
            whole_LNKSd[:, : len(slots_B), :, :length] = whole_LNKSd[:, slots_B, :, :length]


@dataclass(frozen=True, slots=True)
class Address:
    """One call's place in the cache, worked out once for all layers."""

    slots_B1: Tensor
    positions_BT: Tensor
    read: slice | Tensor
    length: int

    def visibility(self, window: int | None) -> Visibility:
        """What these tokens see: their slot's positions up to their own, the last `window` of them."""
        if self.positions_BT.numel() == 1:
            return causal(1, self.length, window)
        keys = torch.arange(self.length, device=self.positions_BT.device)
        # Padding sees position 0, so that its softmax has something to sum over.
        own_BT1 = self.positions_BT.clamp(min=0)[:, :, None]
        hidden_BTS = keys > own_BT1
        if window is not None and window < self.length:
            hidden_BTS |= keys <= own_BT1 - window
        return masked(hidden_BTS)
