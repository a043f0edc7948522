"""A reference -> the module of its weights, adapters merged, and where the files beside them are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ownlm.artifact import Artifact, Workspace
from ownlm.errors import ArtifactError, UserError
from ownlm.formats.settings import read_json
from ownlm.kernels import library
from ownlm.kernels.linear import accelerate
from ownlm.models import peft
from ownlm.models.adapters import merge
from ownlm.models.coded import is_quantised
from ownlm.models.decoder import Decoder
from ownlm.models.weights import load_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """`path` is a directory, or a GGUF file; `digest` is empty where nothing vouches for the files; `merged` says that an adapter
    has changed the weights."""

    module: Any
    path: Path
    name: str
    ref: str
    digest: str
    merged: bool


def open_checkpoint(
    ref: str | Path,
    *,
    adapter: str | Path | None = None,
    workspace: Workspace,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    codes: bool = False,
) -> Checkpoint:
    """The checkpoint of a reference: name, name@version, a folder, a GGUF file, or hf:owner/name[@revision]. An adapter comes
    with its base.

    adapter  another adapter to merge into the model: a reference, or a directory in PEFT's format
    dtype    of the weights; None: as they are stored (float32 after a merge)
    codes    leave a quantised one in its integers where the native kernels can run them and nothing is merged
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
    kept = codes and not adapters and torch.device(device).type == "cpu" and _runs_codes(path)
    module = load_model(path, dtype=torch.float32 if adapters else dtype, device=device, codes=kept)
    if kept and not isinstance(module, Decoder):  # whose whole step is native, when it writes
        accelerate(module)
    for one in adapters:
        in_folder = (Path(one) / peft.CONFIG).is_file()
        peft.load_adapter(module, one if in_folder else workspace.open(one, kind="adapter").path)
        merge(module)
    if adapters and dtype is not None:
        module.to(dtype)
    if adapter is not None:
        full_ref, digest = f"{full_ref} + {adapter}", ""
    return Checkpoint(module=module, path=path, name=name, ref=full_ref, digest=digest, merged=bool(adapters))


def _runs_codes(path: Path) -> bool:
    # The library is looked for last: finding it may mean compiling it.
    return path.is_dir() and is_quantised(read_json(path / "config.json")) and library.library() is not None


def base_of(adapter: Artifact, workspace: Workspace) -> Artifact:
    """The checkpoint that an adapter was trained on. ArtifactError when it is another one by now."""
    source = adapter.manifest.inputs["checkpoint"]
    base = workspace.open(source["ref"], "checkpoint")
    if base.digest != source["digest"]:
        raise ArtifactError(f"{adapter.ref} was trained on another {base.ref}.", where=str(adapter.path))
    return base
