"""A reference -> the module of its weights, adapters merged, and where the files beside them are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ownlm.adapters import peft
from ownlm.adapters.lora import merge
from ownlm.adapters.tuning import with_head_of
from ownlm.artifact import Artifact, Workspace
from ownlm.checkpoints.coded import is_quantised
from ownlm.checkpoints.unread import Unread, open_unread
from ownlm.checkpoints.weights import load_model, read_headers
from ownlm.errors import ArtifactError, UserError
from ownlm.formats.settings import read_json
from ownlm.generate.parallel import Ranks
from ownlm.kernels import library, native
from ownlm.kernels.linear import accelerate
from ownlm.quantization import fp8


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """`path` is a directory, or a GGUF file; `digest` is empty where nothing vouches for the files; `merged` says that an adapter
    has changed the weights; where there is an `unread`, `module` has no weights yet; of a model that is split it is the first part, and
    `ranks` are the processes."""

    module: Any
    path: Path
    name: str
    ref: str
    digest: str
    merged: bool
    unread: Unread | None = None
    ranks: Ranks | None = None


def open_checkpoint(
    ref: str | Path,
    *,
    adapter: str | Path | None = None,
    workspace: Workspace,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    for_kernels: bool = False,
    tensor_parallel: int = 1,
) -> Checkpoint:
    """The checkpoint of a reference: name, name@version, a folder, a GGUF file, or hf:owner/name[@revision]. An adapter comes
    with its base.

    adapter          another adapter to merge into the model: a reference, or a directory in PEFT's format
    dtype            of the weights; None: as they are stored (float32 after a merge)
    for_kernels      leave a decoder's weights in its files, quantised ones in their codes, where the native kernels can take them
                     from there and nothing is merged; of other quantised models the layers are on the kernels. Weights in fp8 stay so
                     on a GPU that multiplies it
    tensor_parallel  processes that the model is split over
    Raises NotFound, ArtifactError when a file is damaged or missing.
    """
    path, adapters = Path(ref), [] if adapter is None else [adapter]
    name, full_ref, digest = path.resolve().name, str(ref), ""
    if path.suffix == ".gguf":
        name = path.stem
    elif (path / peft.CONFIG).is_file() and not (path / "manifest.json").is_file():
        raise UserError("this is an adapter without its base.", where=str(ref), cure="Load the base, adapter=this.")
    elif not (path / "config.json").is_file() or (path / "manifest.json").is_file():
        artifact = workspace.open(ref, kind=("checkpoint", "adapter"))
        name, full_ref, digest = artifact.name, artifact.ref, artifact.digest
        if artifact.kind == "adapter":
            adapters.insert(0, artifact.path)
            artifact = base_of(artifact, workspace)
        path = artifact.path
    if tensor_parallel != 1:
        if tensor_parallel < 1:
            raise UserError(f"{tensor_parallel} is no number of processes.", where="tensor_parallel")
        if adapters:
            raise UserError(
                "an adapter isn't merged into a split model.", where=str(ref), cure="Export the merged model first."
            )
        ranks = Ranks(path, tensor_parallel, dtype=dtype or torch.float32, device=torch.device(device))
        return Checkpoint(
            module=ranks.decoder, path=path, name=name, ref=full_ref, digest=digest, merged=False, ranks=ranks
        )
    unread, native_here = None, for_kernels and not adapters and torch.device(device).type == "cpu"
    if native_here:
        unread = _unread(path, dtype or torch.float32)
    if unread is not None:
        if unread.note:
            workspace.reporter.line(unread.note)
        return Checkpoint(
            module=unread.model, path=path, name=name, ref=full_ref, digest=digest, merged=False, unread=unread
        )
    codes = for_kernels and not adapters and _multiplies_codes(path, torch.device(device))
    module = load_model(path, dtype=torch.float32 if adapters else dtype, device=device, codes=codes)
    if codes and native_here:
        accelerate(module)
    for one in adapters:
        folder = adapter_folder(one, workspace)[0]
        module = with_head_of(module, folder)
        peft.load_adapter(module, folder)
        merge(module)
    if adapters and dtype is not None:
        module.to(dtype)
    if adapter is not None:
        full_ref, digest = f"{full_ref} + {adapter}", ""
    return Checkpoint(module=module, path=path, name=name, ref=full_ref, digest=digest, merged=bool(adapters))


def adapter_folder(
    ref: str | Path, workspace: Workspace, *, base_ref: str = "", base_digest: str = ""
) -> tuple[Path, str]:
    """Where the files of an adapter are, and its full reference: of an artifact, or of a folder in PEFT's format.

    base_ref, base_digest  the checkpoint it is for, where that is known. An artifact of another base (the checkpoint that this one was
                           quantised from is the same) is an ArtifactError.
    """
    path = Path(ref)
    if (path / peft.CONFIG).is_file() and not (path / "manifest.json").is_file():
        return path, str(ref)
    adapter = workspace.open(ref, kind="adapter")
    trained_on = adapter.manifest.inputs.get("checkpoint")
    if base_digest and trained_on is not None and trained_on["digest"] != base_digest:
        source = workspace.open(base_ref).manifest.inputs.get("checkpoint")
        if source is None or source["digest"] != trained_on["digest"]:
            raise ArtifactError(f"{adapter.ref} was trained on another base, {trained_on['ref']}.", where=base_ref)
    return adapter.path, adapter.ref


def _unread(path: Path, dtype: torch.dtype) -> Unread | None:
    found = open_unread(path, dtype)
    # The library is looked for last: finding it may mean compiling it.
    return found if found is not None and native.unsupported(found.model) is None else None


def _multiplies_codes(path: Path, device: torch.device) -> bool:
    """Whether the layers of a quantised directory are multiplied as they lie: on a CPU of another kind of model than a decoder that
    writes, where there are kernels; on a GPU that has fp8, of models in that."""
    if not path.is_dir() or not is_quantised(read_json(path / "config.json")):
        return False
    if device.type == "cpu":
        return library.library() is not None
    held = [entry.dtype for entries in read_headers(path).values() for entry in entries.values()]
    return fp8.E4M3 in held and fp8.multiplies(device)


def base_of(adapter: Artifact, workspace: Workspace) -> Artifact:
    """The checkpoint that an adapter was trained on. ArtifactError when it is another one by now."""
    source = adapter.manifest.inputs["checkpoint"]
    base = workspace.open(source["ref"], "checkpoint")
    if base.digest != source["digest"]:
        raise ArtifactError(f"{adapter.ref} was trained on another {base.ref}.", where=str(adapter.path))
    return base
