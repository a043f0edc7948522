"""How rows become logits: on the native kernels; on the PyTorch modules wherever those can't run (torch_runner.py).

A runner keeps the cache. The engine tells it which pages belong to which row and never looks inside.
Shapes: W wanted tokens of a row, V vocabulary, B rows, T tokens, D hidden.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from ownlm.adapters.lora import Learned
from ownlm.generate.sequence import Row
from ownlm.generate.sequence import Sequence as Writing
from ownlm.kernels.adapters import NativeAdapter
from ownlm.kernels.native import KV, PAGE, Batch, NativeDecoder
from ownlm.models.decoder import Decoder
from ownlm.models.rotary import is_long


class Runner(Protocol):
    """pages, page_tokens: how many pages the cache has, and of how many tokens each. prefill_tokens: of a prompt at a time,
    more are hardly faster. exact: a row's numbers are the same bit by bit whatever rows run beside it and however its prompt
    is cut. layers: between which a row may stop and go on in the next step (the last row of a step only); 1: nowhere.
    adapter_form: what the weights of adapters are here; None's type where there can be none."""

    pages: int
    page_tokens: int
    prefill_tokens: int
    exact: bool
    layers: int

    @property
    def adapter_form(self) -> type[NativeAdapter] | type[Learned] | type[None]: ...

    def run(self, rows: Sequence[Row]) -> Tensor:
        """logits_WV, float32, of the rows' wanted tokens, one row's after the other's; the keys and values of all their tokens go into
        their pages."""
        ...

    def copy(self, page: int, onto: int) -> None:
        """Make one page hold what another does."""
        ...


def salt(model: Decoder, sequence: Writing) -> bytes:
    """What must be equal besides the tokens for two texts to share pages: adapter, tenant, and how positions turn in texts so long."""
    long = any(is_long(layer.rotary, len(sequence.known)) for layer in model.config.layers if layer.rotary)
    number = "" if sequence.adapter is None else sequence.adapter.number
    return f"{int(long)}:{number}:{sequence.tenant}".encode()


class NativeRunner:
    """The native kernels. `model` is asked for the embedding of tokens beside images."""

    exact = True
    adapter_form = NativeAdapter
    page_tokens = PAGE
    prefill_tokens = 512

    def __init__(self, native: NativeDecoder, model: Decoder, *, pages: int, kv: KV | None = None) -> None:
        self.native, self.model, self.pages = native, model, pages
        self.layers = model.config.num_layers
        self.cache = native.cache(pages, kv)
        self.rotaries = {layer.rotary for layer in model.config.layers if layer.rotary is not None}

    def run(self, rows: Sequence[Row]) -> Tensor:
        widest = max(len(row.sequence.pages) for row in rows)
        adapters = list(dict.fromkeys(adapter for row in rows if (adapter := row.sequence.adapter) is not None))
        told: list[tuple[int, ...]] = []  # what the step is told of each token
        for index, row in enumerate(rows):
            sequence, unwanted = row.sequence, len(row.tokens) - row.wanted
            long = any(is_long(rotary, len(sequence.known)) for rotary in self.rotaries)
            number = -1 if sequence.adapter is None else adapters.index(sequence.adapter)
            for place, token in enumerate(row.tokens):
                told.append((token, index, sequence.cached + place, place >= unwanted, long, number))
        token_R, sequence_R, position_R, wanted_R, long_R, adapter_R = np.array(told, np.int32).T.copy()
        partial = rows[-1].layers
        batch = Batch(
            token_R=token_R,
            sequence_R=sequence_R,
            position_R=position_R,
            wanted_R=wanted_R,
            long_R=long_R,
            pages_SP=np.array(
                [row.sequence.pages + [0] * (widest - len(row.sequence.pages)) for row in rows], np.int32
            ),
            embeds_RD=self._embeds(rows),
            partial=0 if partial is None else len(rows[-1].tokens),
            layers=partial or range(0),
            adapter_R=adapter_R if adapters else None,
            adapters=[cast(NativeAdapter, adapter.weights) for adapter in adapters],
        )
        return self.native.step(self.cache, batch)

    def copy(self, page: int, onto: int) -> None:
        self.cache.copy(page, onto)

    def _embeds(self, rows: Sequence[Row]) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None":
        if all(row.sequence.embeds_TD is None for row in rows):
            return None
        each = []
        for row in rows:
            tokens_1T = torch.tensor([row.tokens])
            embeds = embeds_of(self.model, [row.embeds_TD], tokens_1T)
            each.append((self.model.embed(tokens_1T) if embeds is None else embeds)[0].float())
        return torch.cat(each).contiguous().numpy()


def embeds_of(model: Decoder, given: Sequence[Tensor | None], tokens_BT: Tensor) -> Tensor | None:
    """The vectors of these tokens, where some of a prompt's come from images: `given` for the first tokens of each row."""
    if all(embeds_TD is None for embeds_TD in given):
        return None
    embeds_BTD = model.embed(tokens_BT).clone()
    for index, embeds_TD in enumerate(given):
        if embeds_TD is not None:
            embeds_BTD[index, : len(embeds_TD)] = embeds_TD
    return embeds_BTD
