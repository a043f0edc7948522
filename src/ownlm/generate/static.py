"""Steps of writing rows on tensors that stay where they are, which is what a CUDA graph can be made of.

    lines ─► copied into the tensors of the smallest bucket (rows, pages) that holds them ─► the step ─► logits of the real rows

A step of one token per row launches hundreds of kernels that each take microseconds; a graph launches them as one. Rows and
pages that a bucket has too many are padding. A bucket's graph is captured when it has been used a few times, so that a short
answer never waits for it; until then, and on a device that isn't CUDA, the same step just runs.
Shapes: B rows of a bucket, P pages of each, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ownlm.generate.paged import PagedCache
from ownlm.models.blocks import MoE
from ownlm.models.decoder import Decoder
from ownlm.quantization.codes import Quantized

if TYPE_CHECKING:
    from ownlm.generate.torch_runner import Line

CAPTURED_AFTER = 4  # uses


class Steps:
    """The buckets of one model and one cache, made when first needed."""

    def __init__(self, model: Decoder, cache: PagedCache) -> None:
        self.model, self.cache = model, cache
        self.buckets: dict[tuple[int, int, bool], Bucket] = {}
        self.memory: Any = None  # the graphs' memory: one runs at a time, so that all may share it

    @staticmethod
    def possible(model: Decoder) -> bool:
        """False for mixtures of experts, where only the device knows which tokens an expert gets, and for quantised layers, which make
        their levels on the way."""
        return not any(isinstance(module, MoE | Quantized) for module in model.modules())

    def fits(self, lines: Sequence["Line"]) -> bool:
        """Whether these lines are a step of writing, with the model alone, that is gathered in one piece."""
        writing = all(len(line.tokens) == 1 and line.embeds_TD is None and line.adapter is None for line in lines)
        rows, pages = self._size(lines)
        return writing and rows * pages <= self.cache.piece_pages

    def run(self, lines: Sequence["Line"]) -> Tensor:
        """logits_BV, float32, of lines of one token and one rotation."""
        rows, pages = self._size(lines)
        key = rows, pages, lines[0].long
        if key not in self.buckets:
            self.buckets[key] = Bucket(self.model, self.cache, rows, pages, long=lines[0].long)
        bucket = self.buckets[key]
        bucket.fill(lines)
        if bucket.graph is None and self.model.device.type == "cuda" and bucket.uses >= CAPTURED_AFTER:
            self.memory = self.memory or torch.cuda.graph_pool_handle()
            bucket.capture(self.memory)
        return bucket.run()[: len(lines)]

    def _size(self, lines: Sequence["Line"]) -> tuple[int, int]:
        return bucket_rows(len(lines)), bucket_pages(-(-max(line.length for line in lines) // self.cache.page))


class Bucket:
    """The tensors of one shape, and the step over them. Changes with every call."""

    def __init__(self, model: Decoder, cache: PagedCache, rows: int, pages: int, *, long: bool) -> None:
        self.model, self.cache, self.long = model, cache, long
        # Token, position and pages of each row in one tensor: what a step is told goes to the device in one copy.
        self.given_BP = torch.empty(rows, 2 + pages, dtype=torch.int64, device=model.device)
        self.uses = 0
        self.graph: Any = None
        self.logits_BV: Tensor | None = None

    def fill(self, lines: Sequence["Line"]) -> None:
        """Write the lines into the tensors; what is left is padding, at position -1 of the page of padding."""
        rows, width = self.given_BP.shape
        none = self.cache.pages
        table = [[line.tokens[0], line.start, *line.pages] for line in lines] + [[0, -1]] * (rows - len(lines))
        self.given_BP.copy_(torch.tensor([[*row, *[none] * (width - len(row))][:width] for row in table]))
        self.uses += 1

    def step(self) -> Tensor:
        """logits_BV of what the tensors hold."""
        tokens_B1, positions_B1, pages_BP = self.given_BP[:, :1], self.given_BP[:, 1:2], self.given_BP[:, 2:]
        address = self.cache.address(positions_B1, pages_BP, long=self.long)
        hidden_B1D = self.model(tokens_B1, place=address)
        return self.model.logits(hidden_B1D[:, 0]).float()

    def capture(self, memory: Any) -> None:
        """Make the step a graph. It has run before, so that what kernels make for themselves is there."""
        torch.cuda.synchronize(self.model.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            self.logits_BV = self.step()
        self.graph = graph

    def run(self) -> Tensor:
        """logits_BV. Of a graph a copy: the next one writes over its own."""
        if self.graph is None or self.logits_BV is None:
            return self.step()
        self.graph.replay()
        return self.logits_BV.clone()


def bucket_rows(count: int) -> int:
    """1, 2, 4, 8, then multiples of 8: the smallest that holds `count` rows."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def bucket_pages(count: int) -> int:
    """Powers of two: the smallest that holds `count` pages."""
    return 1 << (count - 1).bit_length()
