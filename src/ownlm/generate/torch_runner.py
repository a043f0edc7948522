"""The PyTorch modules as a runner: on a GPU, and wherever the native kernels can't run.

    rows ─► lines (numbers only) ─► batches: those who write, those who read; of equal rotation ─► logits of what is wanted

Lines say all there is to know of a row, so that other processes can compute the same (parallel.py).
Shapes: W wanted tokens of a line, V vocabulary, B rows, T tokens, D hidden, P pages of a row.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ownlm.adapters.lora import Learned, beside
from ownlm.generate.paged import PagedCache, position_bytes
from ownlm.generate.runners import embeds_of
from ownlm.generate.sequence import Row
from ownlm.generate.static import Steps
from ownlm.models.decoder import Decoder
from ownlm.models.rotary import is_long

PAGE = 32  # positions, where sequences share pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """What a row is to the modules: its tokens, from position `start` of the sequence in `pages` on; the logits of the last
    `wanted` are asked for. `long`: how positions turn. `embeds_TD` stands in for the embedding of the first tokens. `adapter`: what it is
    computed with beside the model."""

    tokens: list[int]
    start: int
    pages: list[int]
    wanted: int
    long: bool = False
    embeds_TD: Tensor | None = None
    adapter: Learned | None = None

    @property
    def length(self) -> int:
        return self.start + len(self.tokens)


class TorchRunner:
    """The modules themselves over a cache of `pages` pages of `page` positions. `static`: steps of those who write run on tensors that
    stay where they are (static.py), as CUDA graphs need it; None: on CUDA, where they can."""

    exact = False
    layers = 1
    adapter_form = Learned
    prefill_tokens = 4096  # of one forward, padding included (a single row may be longer)

    def __init__(self, model: Decoder, *, pages: int, page: int, static: bool | None = None) -> None:
        self.model, self.device, self.pages, self.page_tokens = model, model.device, pages, page
        self.cache = PagedCache(model.config, pages=pages, page=page, dtype=model.dtype, device=model.device)
        self.rotaries = {layer.rotary for layer in model.config.layers if layer.rotary is not None}
        static = model.device.type == "cuda" and Steps.possible(model) if static is None else static
        self.steps = Steps(model, self.cache) if static else None

    def run(self, rows: Sequence[Row]) -> Tensor:
        return self.compute([self.line(row) for row in rows])

    def line(self, row: Row) -> Line:
        """The row by itself."""
        length, adapter = len(row.sequence.known), row.sequence.adapter
        return Line(
            tokens=row.tokens,
            start=row.sequence.cached,
            pages=row.sequence.pages,
            wanted=row.wanted,
            long=any(is_long(rotary, length) for rotary in self.rotaries),
            embeds_TD=row.embeds_TD,
            adapter=None if adapter is None else cast(Learned, adapter.weights),
        )

    def copy(self, page: int, onto: int) -> None:
        self.cache.copy(page, onto)

    def compute(self, lines: Sequence[Line]) -> Tensor:
        """logits_WV, float32, of the lines' wanted tokens, one line's after the other's."""
        states: dict[int, Tensor] = {}
        results: dict[int, Tensor] = {}
        for chosen in self._batches(lines):
            some = [lines[index] for index in chosen]
            if self.steps is not None and self.steps.fits(some):
                for index, logits_V in zip(chosen, self.steps.run(some), strict=True):
                    results[index] = logits_V[None][: lines[index].wanted]
                continue
            with beside(self.model, [line.adapter for line in some]):
                hidden_BTD = self._forward(some)
            for index, hidden_TD in zip(chosen, hidden_BTD, strict=True):
                count = len(lines[index].tokens)
                states[index] = hidden_TD[count - lines[index].wanted : count]
        # One product for all that is wanted.
        if sum(map(len, states.values())):
            logits_WV = self.model.logits(torch.cat(list(states.values()))).float()
            results |= dict(zip(states, torch.split(logits_WV, [*map(len, states.values())]), strict=True))
        for index, hidden_WD in states.items():
            if (adapter := lines[index].adapter) is not None and adapter.head is not None:
                weight, bias = adapter.head
                own = weight.to(hidden_WD.dtype), None if bias is None else bias.to(hidden_WD.dtype)
                results[index] = self.model.logits(hidden_WD, own).float()
        wanted = [results[index] for index in range(len(lines)) if index in results]
        return torch.cat(wanted) if wanted else torch.empty(0, self.model.config.vocab_size, device=self.device)

    def _batches(self, lines: Sequence[Line]) -> Iterator[list[int]]:
        """Those who write apart from those who read, each by length."""
        kinds = {(line.long, len(line.tokens) == 1) for line in lines}
        for long, writing in sorted(kinds):
            order = sorted(
                (index for index, line in enumerate(lines) if (line.long, len(line.tokens) == 1) == (long, writing)),
                key=lambda index: (len(lines[index].tokens), lines[index].length),
            )
            while order:
                count = max(1, self.prefill_tokens // len(lines[order[-1]].tokens))
                # Neighbouring pages in order, for the cache reads those without a copy; of several pages, similar lengths.
                short = all(lines[index].length <= self.page_tokens for index in order[-count:])
                yield sorted(order[-count:], key=lambda index: lines[index].pages[:1]) if short else order[-count:]
                order = order[:-count]

    def _forward(self, lines: Sequence[Line]) -> Tensor:
        """hidden_BTD, padded on the right."""
        width, lengths = max(len(line.tokens) for line in lines), [line.length for line in lines]
        count = -(-max(lengths) // self.page_tokens)
        tokens_BT = self._table([line.tokens for line in lines], width, 0)
        # Position -1 is padding: nobody sees it.
        positions_BT = self._table([range(line.start, line.length) for line in lines], width, -1)
        pages_BP = self._table([line.pages[:count] for line in lines], count, self.pages)
        first = [line.pages[0] for line in lines]
        neighbours = count == 1 and first == list(range(first[0], first[0] + len(lines)))
        address = self.cache.address(
            positions_BT, pages_BP, lengths=lengths, first=first[0] if neighbours else None, long=lines[0].long
        )
        hidden_BTD: Tensor = self.model(
            tokens_BT,
            place=address,
            embeds_BTD=embeds_of(self.model, [line.embeds_TD for line in lines], tokens_BT),
        )
        return hidden_BTD

    def _table(self, rows: Iterable[Sequence[int]], width: int, padding: int) -> Tensor:
        return torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows], device=self.device)


def torch_runner(
    model: Decoder, *, slots: int, context: int, room: int | None = None, static: bool | None = None
) -> TorchRunner:
    """A runner for `slots` answers of `context` positions, its cache within `room` bytes as long as a page fits. A page is a whole
    sequence on a CPU, where gathering pages costs more than the attention over them; elsewhere, with less room, sequences are shorter."""
    page = context if model.device.type == "cpu" else PAGE
    most = slots * -(-context // page)
    if room is not None:
        most = min(most, room // (page * position_bytes(model.config, model.dtype)))
    return TorchRunner(model, pages=max(1, most), page=page, static=static)
