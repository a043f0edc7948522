"""GGUF files as checkpoints: a file, or all parts of a split one -> its config, its names, and its tensors, decoded one at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ownlm import gguf
from ownlm.checkpoints.gguf.architectures import ARCHITECTURES, DERIVED, Keys, meaning, pooling
from ownlm.errors import ArtifactError, UserError
from ownlm.formats.ggml import DECODERS, PLAIN, Blocks
from ownlm.formats.tensorfile import Entry
from ownlm.models.families.family import Opened, Tensors


def open_gguf(path: Path) -> Opened:
    """What a file describes. ArtifactError for a damaged one, UserError for an architecture or a type that can't be read."""
    parts = _parts(path)
    tensors = {name: info for part in parts for name, info in part.tensors.items()}
    if len(tensors) < sum(len(part.tensors) for part in parts):
        raise ArtifactError("a tensor is in more than one part.", where=str(path))
    for name, info in tensors.items():
        if info.type not in PLAIN and info.type not in DECODERS:
            raise UserError(
                f"tensor {name} is of type {info.type}, which can't be read.",
                where=str(path),
                cure=f"Take another file of the model: {', '.join([*PLAIN, *DECODERS])} are read.",
            )
    keys = Keys(gguf.File(path, parts[0].metadata, tensors))
    if keys.architecture not in ARCHITECTURES:
        raise UserError(
            f"its architecture is {keys.architecture!r:.60}, which ownlm doesn't know.",
            where=str(path),
            cure=f"Known: {', '.join(ARCHITECTURES)}.",
        )
    hf, config, family = meaning(keys, str(path))
    return Opened(
        hf=hf,
        config=config,
        family=replace(
            family, names=ARCHITECTURES[keys.architecture].names, prefix="", spellings=(), derived=DERIVED, copies={}
        ),
        files={
            part.path: {
                name: Entry(PLAIN.get(info.type, torch.float32), info.shape, info.start, info.end)
                for name, info in part.tensors.items()
            }
            for part in parts
        },
        maps=[_Mapped(part) for part in parts],
        pooling=pooling(keys),
    )


def _parts(path: Path) -> list[gguf.File]:
    """The files of a model that was split, the first one first; the file itself if it wasn't."""
    file = gguf.read(path)
    count = file.metadata.get("split.count")
    if not isinstance(count, np.integer) or count <= 1:
        return [file]
    paths = gguf.parts(path)
    if len(paths) != count:
        raise ArtifactError(
            f"it is one of {count} parts, but isn't called so.",
            where=str(path),
            cure=f"Name the parts NAME-00001-of-{int(count):05}.gguf and so on.",
        )
    return [gguf.read(part) for part in paths]


class _Mapped:
    """A part of a model, mapped: its tensors as blocks, plain ones as numbers."""

    def __init__(self, part: gguf.File) -> None:
        self.part, self._map = part, gguf.Mapped(part)
        self.give_back = self._map.give_back

    def tensor(self, name: str) -> Tensor | Blocks:
        return self._read(name, self._map.bytes(name))

    def stream(self) -> Iterator[Tensors]:
        for name, raw, give_back in self._map.stream():
            rows_back = partial(_rows_back, give_back, len(raw), self.part.tensors[name].shape[0])
            yield name, self._read(name, raw, give_back), rows_back

    def _read(
        self, name: str, raw: NDArray[np.uint8], give_back: Callable[[int], None] = lambda done: None
    ) -> Tensor | Blocks:
        info = self.part.tensors[name]
        blocks = Blocks(info.type, torch.from_numpy(raw), info.shape, give_back)
        return blocks if info.type in DECODERS else blocks.tensor(PLAIN[info.type])


def _rows_back(give_back: Callable[[int], None], size: int, rows: int, done: int) -> None:
    give_back(size // rows * min(done, rows))
