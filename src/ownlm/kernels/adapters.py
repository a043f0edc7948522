"""An adapter packed for the native step, beside a base that stays as it is.

    Learned (pairs by layer) ── NativeAdapter(native, learned) ──► Batch(adapters=…, adapter_R=…)

A step multiplies by one matrix where the model has q, k and v, or gate and up: the pairs of such a place become one where that
costs no more (they share A, or all their ranks fit half a group of inputs), else each is added to its own outputs. The scale goes into B.
Kept in bf16, in float32 beside a float32 base; memory is given back when the object goes.

Shapes: r rank, O outputs, I inputs.
"""

import ctypes
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ownlm.adapters.lora import Learned, Pair
from ownlm.errors import UserError
from ownlm.kernels import native
from ownlm.kernels.native import GROUP, KINDS, LANES, NativeDecoder
from ownlm.kernels.sources import Kind

PLACES = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "o_proj": 1,
    "gate_proj": 2,
    "up_proj": 2,
    "down_proj": 3,
}  # lora.h: Site
Part = tuple[int, Tensor, Tensor]  # the first output, A_rI, B_Or with its scale


class NativeAdapter:
    """Packed for a decoder and its likes: whatever NativeDecoder has the same config. Changes never."""

    def __init__(self, decoder: NativeDecoder, learned: Learned) -> None:
        """Raises UserError without memory."""
        self._lib, config = decoder._lib, decoder.config
        self.handle = ctypes.c_void_p(self._lib.ownlm_adapter_new(config.num_layers))
        kind: Kind = "f32" if decoder.kind == "f32" else "bf16"
        places: dict[tuple[int, int], list[Part]] = {}
        for name, pair in learned.pairs.items():
            layer, module = _layer(name)
            places.setdefault((layer, PLACES[module]), []).append(_part(decoder, layer, module, pair))
        for (layer, place), parts in places.items():
            for at, A_rI, B_Or in joined(sorted(parts, key=lambda part: part[0])):
                self._pair(layer, place, KINDS[kind], at, A_rI.contiguous(), B_Or.contiguous())
        if learned.head is not None:
            weight, bias = learned.head
            whole = [None if one is None else one.detach().float().contiguous() for one in (weight, bias)]
            addresses = [None if one is None else one.data_ptr() for one in whole]
            if self._lib.ownlm_adapter_head(self.handle, KINDS[decoder.kind], *weight.shape, *addresses):
                raise native.no_memory()

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._lib.ownlm_adapter_delete(self.handle)

    @property
    def memory_bytes(self) -> int:
        return int(self._lib.ownlm_adapter_bytes(self.handle))

    def _pair(self, layer: int, place: int, kind: int, at: int, A_rI: Tensor, B_Or: Tensor) -> None:
        (rank, inputs), outputs = A_rI.shape, len(B_Or)
        shape = (at, inputs, outputs, rank)
        if self._lib.ownlm_adapter_pair(self.handle, layer, place, kind, *shape, A_rI.data_ptr(), B_Or.data_ptr()):
            raise native.no_memory()


def joined(parts: Sequence[Part]) -> list[Part]:
    """The pairs of one place, by their first output, as one where that costs no more than each by itself."""
    shared = all(torch.equal(A_rI, parts[0][1]) for _, A_rI, _ in parts)
    whole_lanes = all(at % LANES == 0 for at, _, _ in parts)
    ranks = [len(A_rI) for _, A_rI, _ in parts]
    if len(parts) == 1 and whole_lanes:
        return list(parts)
    if whole_lanes and not shared and sum(ranks) > GROUP // 2:
        return list(parts)
    last_at, _, last = parts[-1]
    A_rI = parts[0][1] if shared else torch.cat([A_rI for _, A_rI, _ in parts])
    B_Or = A_rI.new_zeros(last_at + len(last), len(A_rI))
    column = 0
    for at, _, block in parts:
        B_Or[at : at + len(block), column : column + block.shape[1]] = block
        column += 0 if shared else block.shape[1]
    return [(0, A_rI, B_Or)]


def _layer(name: str) -> tuple[int, str]:
    """The number of a layer and which of its matrices."""
    found = re.fullmatch(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)", name)
    if found is None or found[2] not in PLACES:
        raise UserError(f"an adapter of {name} can't run beside the base.", cure="Merge it: ownlm.load(…, adapter=…).")
    return int(found[1]), found[2]


def _part(decoder: NativeDecoder, layer: int, module: str, pair: Pair) -> Part:
    """A pair as the step's matrices lie: heads padded to whole lanes, and where its outputs begin in its place."""
    spec = decoder.config.layers[layer]
    heads, kv_heads = spec.attention.num_heads, spec.attention.num_kv_heads
    A_rI, B_Or = pair.A.detach().float().cpu(), pair.B.detach().float().cpu() * pair.scale
    if module == "o_proj":
        A_rI = decoder.by_head(A_rI.T).T
    elif module in ("q_proj", "k_proj", "v_proj"):
        B_Or = decoder.by_head(B_Or)
    first_head = {"k_proj": heads, "v_proj": heads + kv_heads}.get(module, 0)
    first = spec.mlp.size if module == "up_proj" and spec.mlp.gated else first_head * decoder.padded_head
    return first, A_rI, B_Or
