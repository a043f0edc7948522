"""Pickled weights into a safetensors directory. The pickle is read by a confined child; this process never opens it.

pytorch_model.bin, or its shards and their index, or any file of torch.save  ─►  DIR/model*.safetensors
config.json, tokenizer and template beside it                                ─►  copied
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ownlm import hub
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.formats.settings import read_json
from ownlm.formats.tensorfile import read_header, shard_name, write_index
from ownlm.report import Reporter, quantity, size
from ownlm.sandbox import Limits, run
from ownlm.storage import flush, require_space, storage

WHOLE, INDEX, ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
CHILD = "ownlm.formats.torchfile:convert"
GROWTH = 4  # as the child allows: tensors that share a storage are written one by one


def convert(path: str | Path, *, out: str | Path, reporter: Reporter | None = None) -> Path:
    """The directory `out`, a safetensors checkpoint of the pickled one at `path` (a directory or a file of torch.save).

    A pickle is a program: it is read in a child process that can open and start nothing, by a reader that knows only what
    state dicts are made of. Tensors that share a storage are written one by one. `out` is there whole, or not at all.
    Raises UserError, NotFound or ArtifactError.
    """
    source, target = Path(path), Path(out)
    reporter = reporter or Reporter.silent()
    files = _pickles(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("this is there already.", where=str(target), cure="Name a new folder, or empty it.")
    bytes = sum(file.stat().st_size for file in files.values())
    require_space(target.absolute().parent, bytes)
    where: dict[str, str] = {}
    written = 0
    with _draft(target) as folder:
        for name, file in files.items():
            _convert(file, folder / name, reporter)
            entries = read_header(folder / name)
            if twice := where.keys() & entries.keys():
                raise ArtifactError(f"tensor {min(twice)} is in more than one shard.", where=str(source))
            where |= dict.fromkeys(entries, name)
            written += sum(entry.end - entry.start for entry in entries.values())
        if len(files) > 1:
            write_index(folder, where, written)
        beside = source if source.is_dir() else source.parent
        for name in hub.beside(beside):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(beside / name, folder / name)
    reporter.line(f"{target}: {quantity(len(where))} tensors, {size(written)}")
    reporter.event("converted", path=target, tensors=len(where), bytes=written)
    return target


def _pickles(source: Path) -> dict[str, Path]:
    """The files to convert by the name of what becomes of them."""
    if source.is_file():
        return {"model.safetensors": source}
    if not source.is_dir():
        raise NotFound("there is no such file or folder.", where=str(source))
    if list(source.glob("*.safetensors")):
        raise UserError("this folder has safetensors already; there is nothing to convert.", where=str(source))
    if (source / INDEX).is_file():
        shards = read_json(source / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ArtifactError("weight_map must name a file for each tensor.", where=str(source / INDEX))
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".bin"):
                raise ArtifactError(f"{name!a} is not the name of a .bin file beside it.", where=str(source / INDEX))
            if not (source / name).is_file():
                raise NotFound("this file, which the index names, is not there.", where=str(source / name))
        return {shard_name(number, len(names)): source / name for number, name in enumerate(names, 1)}
    for name, becomes in ((WHOLE, "model.safetensors"), (ADAPTER, "adapter_model.safetensors")):
        if (source / name).is_file():
            return {becomes: source / name}
    raise NotFound(
        f"there is no {WHOLE} in this folder.", where=str(source), cure="Name the file itself if it has another name."
    )


def _convert(source: Path, target: Path, reporter: Reporter) -> None:
    with source.open("rb") as pickled, target.open("wb") as safe, storage(target.parent):
        bytes = os.fstat(pickled.fileno()).st_size
        limits = Limits(
            memory_bytes=512_000_000 + 3 * bytes,  # the mapped file; a tensor that lies scattered, gathered
            cpu_s=60 + bytes // 50_000_000,
            wall_s=300 + bytes // 5_000_000,
            file_bytes=GROWTH * bytes + 64_000_000,
        )
        reporter.status(f"{source.name}: reading {size(bytes)} of pickled tensors in a confined process")
        outcome = run(CHILD, pickled.fileno(), safe.fileno(), limits)
        if outcome.report is None:
            require_space(target.parent, 1_000_000)
            raise ArtifactError(f"{outcome.fault}.", where=str(source), cure="Nothing was written.")
        os.fsync(safe.fileno())
    guards = " and ".join(outcome.guards)
    reporter.line(
        f"{source.name}: {outcome.report.get('tensors')} tensors, read in a child process confined by {guards}"
    )
    if "seccomp" not in outcome.guards:
        reporter.line(
            "This system has no seccomp for us: only the reader and the limits stood between the file and it."
        )
    if left_out := outcome.report.get("left_out"):
        reporter.line(f"{source.name}: left out, because they are not tensors: {', '.join(map(str, left_out))}")


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` that takes its place at the end, or is gone after an error."""
    folder = target.absolute().parent / f".{target.name}.{os.getpid()}"
    with storage(folder.parent):
        folder.mkdir(parents=True)
        try:
            yield folder
            folder.rename(target)
            flush(folder.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
