"""Checkpoint directories: config.json, generation_config.json and safetensors, as Hugging Face lays them out.

Loading is strict: the file must hold exactly the tensors that its config describes, of the right shape, or one sentence
names those that aren't so. Nothing is allocated before that is known.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ownlm.errors import ArtifactError, NotFound
from ownlm.models.decoder import Decoder
from ownlm.models.families import Family, Stored, from_hf, to_hf
from ownlm.models.tensorfile import Entry, read_header, read_tensors, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TIED_HEAD = "lm_head.weight"  # some files store the tied head a second time


def load_model(
    directory: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Decoder:
    """The model of a Hugging Face directory, in `dtype` (None: as it is stored), ready for inference or training.

    Raises NotFound (no such directory or file), UserError (a family or a value we don't compute) and ArtifactError
    (damaged file; missing, unexpected or wrongly shaped tensor).
    """
    root = Path(directory)
    config, family = from_hf(read_json(root / "config.json"), where=str(root / "config.json"))
    files = _files(root)
    with torch.device("meta"):
        model = Decoder(config)
    ours = dict(model.named_parameters())
    table = _match(family, tuple(family.tensors(config)), ours, files, config.tie_embeddings, root)
    stored = next(entries[name].dtype for entries in files.values() for name in entries if name in table)
    model = model.to(dtype or stored).to_empty(device=device)
    ours = dict(model.named_parameters())
    copied_head = None
    for path, entries in files.items():
        for name, tensor in read_tensors(path, entries):
            if name in table:
                _place(table[name], tensor, ours)
            elif name == TIED_HEAD:
                copied_head = tensor.to(dtype or stored, copy=True)
    if copied_head is not None and not torch.equal(copied_head.to(device), model.head_weight):
        raise ArtifactError(f"tensor {TIED_HEAD} differs from the embedding it is tied to.", where=str(root))
    return model.eval()


def save_model(
    model: Decoder,
    directory: Path | str,
    *,
    dtype: torch.dtype | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> None:
    """Write config.json, generation_config.json and model.safetensors, in `dtype` (None: the model's own).

    The special ids (of the tokenizer) are for other libraries' generation; ownlm reads them from the tokenizer.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    ours = dict(model.named_parameters())
    target = dtype or model.head_weight.dtype
    _, family = from_hf(to_hf(model.config))

    def joined(stored: Stored) -> Tensor:
        parts = [ours[name].detach().to(target) for name in stored.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.T if stored.transposed else whole

    write_tensors(root / SINGLE, [(stored.name, joined(stored)) for stored in family.tensors(model.config)])
    eos = list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos, "pad_token_id": pad_token_id}
    names = to_hf(model.config) | special | {"dtype": str(target).removeprefix("torch.")}
    write_json(root / "config.json", names)
    write_json(root / "generation_config.json", {key: value for key, value in special.items() if value is not None})


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise NotFound("there is no such file.", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"this is not JSON: {error}.", where=str(path)) from None
    if not isinstance(value, dict):
        raise ArtifactError("this is not a JSON object.", where=str(path))
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _files(root: Path) -> dict[Path, dict[str, Entry]]:
    """The headers of one file, or of all shards that the index names."""
    if not (root / INDEX).exists():
        return {root / SINGLE: read_header(root / SINGLE)}
    where = str(root / INDEX)
    shards = read_json(root / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ArtifactError("weight_map must name a file for each tensor.", where=where)
    for name in shards.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ArtifactError(f"{name!r} is not the name of a safetensors file beside the index.", where=where)
    files = {root / name: read_header(root / name) for name in sorted(set(shards.values()))}
    held = {tensor: path.name for path, entries in files.items() for tensor in entries}
    if sum(map(len, files.values())) != len(held):
        raise ArtifactError("a tensor is in more than one shard.", where=where)
    if wrong := sorted(name for name in shards.keys() | held.keys() if shards.get(name) != held.get(name)):
        raise ArtifactError(f"tensor {wrong[0]} is not where the index says.", where=where)
    return files


def _match(
    family: Family,
    table: tuple[Stored, ...],
    ours: Mapping[str, Tensor],
    files: Mapping[Path, Mapping[str, Entry]],
    tied: bool,
    root: Path,
) -> dict[str, Stored]:
    """Which stored tensor becomes which of ours; ArtifactError names the missing, unexpected and misshapen."""
    held = {name: entry for entries in files.values() for name, entry in entries.items()}
    if not any(name.startswith(family.prefix) for name in held):
        table = tuple(Stored(t.name.removeprefix(family.prefix), t.ours, t.transposed) for t in table)
    wanted = {stored.name: stored for stored in table}
    faults = [f"tensor {name} is missing" for name in wanted if name not in held]
    faults += [
        f"tensor {name} is unexpected"
        for name in held
        if name not in wanted and not re.fullmatch(family.derived, name) and not (tied and name == TIED_HEAD)
    ]
    for name, stored in wanted.items():
        if name in held:
            shape = _stored_shape(stored, ours)
            if held[name].shape != shape:
                faults.append(f"tensor {name} has shape {held[name].shape}, the config asks for {shape}")
            elif not held[name].dtype.is_floating_point:
                faults.append(f"tensor {name} holds {held[name].dtype}, not numbers with a fraction")
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ArtifactError("; ".join(faults[:5]) + more + ".", where=str(root))
    return wanted


def _stored_shape(stored: Stored, ours: Mapping[str, Tensor]) -> tuple[int, ...]:
    shapes = [tuple(ours[name].shape) for name in stored.ours]
    joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return joined[::-1] if stored.transposed else joined


def _place(stored: Stored, tensor: Tensor, ours: Mapping[str, Tensor]) -> None:
    whole = tensor.T if stored.transposed else tensor
    targets = [ours[name].detach() for name in stored.ours]
    for target, part in zip(targets, torch.split(whole, [t.shape[0] for t in targets]), strict=True):
        target.copy_(part)
