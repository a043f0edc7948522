"""GGUF files as checkpoints: a file, or all parts of a split one -> its config, its names, and its tensors, decoded one at a time."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ownlm import gguf
from ownlm.errors import ArtifactError, UserError
from ownlm.formats.ggml import DECODERS, PLAIN, Blocks
from ownlm.formats.tensorfile import Entry
from ownlm.models.families.family import Opened, Tensors
from ownlm.models.gguf.architectures import ARCHITECTURES, DERIVED, Keys, meaning, pooling


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
        tensors=partial(_stream, parts),
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


def _stream(parts: list[gguf.File]) -> Iterator[Tensors]:
    for part in parts:
        for name, raw, give_back in gguf.stream(part):
            info = part.tensors[name]
            blocks = Blocks(info.type, torch.from_numpy(raw), info.shape, give_back)
            tensor = blocks if info.type in DECODERS else blocks.tensor(PLAIN[info.type])
            yield name, tensor, partial(_rows_back, give_back, len(raw), info.shape[0])


def _rows_back(give_back: Callable[[int], None], size: int, rows: int, done: int) -> None:
    give_back(size // rows * min(done, rows))
