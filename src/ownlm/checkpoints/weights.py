"""Checkpoint directories: config.json, generation_config.json and safetensors, as Hugging Face lays them out.

Loading is strict: the file must hold exactly the tensors that its config describes, of the right shape, or one sentence
names those that aren't so. Nothing is allocated before that is known.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ownlm.checkpoints import coded, shards
from ownlm.checkpoints.gguf.read import open_gguf
from ownlm.checkpoints.pooling import read_pooling, write_pooling
from ownlm.checkpoints.shards import Shard
from ownlm.errors import ArtifactError, UserError
from ownlm.formats.settings import read_json, write_json
from ownlm.formats.tensorfile import Entry, Mapped, Pending, read_header, write_shards
from ownlm.models.blank import blank
from ownlm.models.families import FAMILIES, Family, from_hf, to_hf
from ownlm.models.families.family import Opened
from ownlm.models.names import Stored, renamed, stored_tensors
from ownlm.quantization.calibrate import Quantizable

SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    codes: bool = False,
    shard: Shard | None = None,
) -> Any:
    """The model of a Hugging Face directory or a GGUF file, in `dtype` (None: as it is stored, float32 for quantised blocks; of
    several types one that holds all), ready for inference or training. With `codes` a directory that `ownlm quantize` wrote is
    opened as the integers it holds, mapped from the file and for inference only; else as the numbers they stand for. With
    `shard` a decoder is opened as that part of it (shards.py).

    Raises NotFound (no such directory or file), UserError (a family or a value we don't compute) and ArtifactError
    (damaged file; missing, unexpected or wrongly shaped tensor).
    """
    root = Path(path)
    if root.is_dir() and coded.is_quantised(hf := read_json(root / "config.json")):
        if shard is not None:
            raise UserError(
                "a quantised checkpoint can't be split.", where=str(root), cure="Split what it was made of."
            )
        return coded.load(root, hf, read_headers(root), dtype=dtype, device=device, codes=codes)
    return fill(describe(root), dtype=dtype, device=device, shard=shard)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Described:
    """A checkpoint whose files hold what its config asks for: the model without weights, and what its tensors are called."""

    root: Path
    opened: Opened
    model: Any
    names: "Names"

    @property
    def stored(self) -> torch.dtype:
        """The type of the weights; of several types one that holds all."""
        types = [
            entry.dtype for held in self.opened.files.values() for name, entry in held.items() if self.names.find(name)
        ]
        # Of GGUF the first: norms are wider there than in the model it was made of.
        return types[0] if self.root.is_file() else reduce(torch.promote_types, types)


def describe(root: Path) -> Described:
    """What `load_model` reads. The same errors."""
    opened = open_gguf(root) if root.is_file() else _open(root)
    family, files = opened.family, opened.files
    with blank():
        model: Any = family.build(opened.config, opened.hf)
    model.pooling = opened.pooling
    ours = dict(model.named_parameters())
    held = frozenset(name for entries in files.values() for name in entries)
    names = Names(family, stored_tensors(family.names(opened.config), ours), held)
    tied = hasattr(model, "head_weight") and not any(name.endswith("lm_head.weight") for name in ours)
    _match(names, ours, files, root, tied=tied)
    return Described(root=root, opened=opened, model=model, names=names)


def fill(
    described: Described, *, dtype: torch.dtype | None, device: torch.device | str, shard: Shard | None = None
) -> Any:
    """The described model, or a shard of it, with its weights."""
    names, dtype = described.names, dtype or described.stored
    model = described.model.to(dtype)
    uncut, cuts = dict(model.named_parameters()), dict[str, shards.Cut]()
    if shard is not None:
        shards.check(model, shard.size, where=str(described.root))
        model, cuts = shards.shard_of(model, shard)
        model.pooling = described.opened.pooling
    model = model.to_empty(device=device)
    ours = dict(model.named_parameters())
    second = {}
    for name, tensor, give_back in described.opened.tensors():
        if (target := names.find(name)) is not None:
            if shard is None:
                target.place(tensor, ours, give_back)
            else:
                shards.place(target, tensor, ours, give_back, whole=uncut, cuts=cuts, shard=shard)
        elif not names.derived(name):
            whole = tensor if isinstance(tensor, Tensor) else tensor.tensor()
            second[name] = whole.to(dtype, copy=True)
    for name, tensor in second.items():
        twin = names.copy_of(name, ours)
        if twin is not None and shard is not None:
            tensor = cuts[twin].of(tensor, like=ours[twin])  # an embedding, or a head
        if twin is None or not torch.equal(tensor.to(device), ours[twin]):
            raise ArtifactError(f"tensor {name} differs from the {twin} it is tied to.", where=str(described.root))
    return model.eval()


def _open(root: Path) -> Opened:
    hf = read_json(root / "config.json")
    files = read_headers(root)
    held = frozenset(name for entries in files.values() for name in entries)
    config, family = from_hf(hf, where=str(root / "config.json"), stored=held)
    maps = [Mapped(path, entries) for path, entries in files.items()]
    return Opened(hf=hf, config=config, family=family, files=files, maps=maps, pooling=read_pooling(root))


class Names:
    """The tensors of a family as the files at hand spell them."""

    def __init__(self, family: Family, table: Sequence[Stored], held: Iterable[str]) -> None:
        self.family = family
        self.spelling = {name: self._canonical(name) for name in held}
        spelled = set(self.spelling.values())
        files, ours = (any(name.startswith(family.prefix) for name in group) for group in (spelled, _names(table)))
        if ours and not files:
            table = renamed(table, lambda name: name.removeprefix(family.prefix))
        elif files and not ours:
            table = renamed(table, lambda name: family.prefix + name)
        self.table = {stored.name: stored for stored in table}

    def _canonical(self, name: str) -> str:
        for pattern, replacement in self.family.spellings:
            name = re.sub(pattern, replacement, name)
        return name

    def find(self, name: str) -> Stored | None:
        """What the tensor of this name in a file is made of."""
        return self.table.get(self.spelling[name])

    def copy_of(self, name: str, ours: Mapping[str, Tensor]) -> str | None:
        """Which tensor of ours this one of a file repeats, where there is no room for a second."""
        twins = (twin for end, twin in self.family.copies.items() if self.spelling[name].endswith(end))
        return next((twin for twin in twins if twin in ours), None)

    def derived(self, name: str) -> bool:
        """True for stored tensors that are no weights."""
        return re.fullmatch(self.family.derived, self.spelling[name]) is not None


def stored_dtypes(path: Path, model: Any) -> dict[str, torch.dtype]:
    """How each tensor is stored in the directory that `model` was loaded from, by the names `save_model` gives."""
    opened, ours = _open(path), dict(model.named_parameters())
    held = {name: entry.dtype for entries in opened.files.values() for name, entry in entries.items()}
    table = stored_tensors(opened.family.names(model.config), ours)
    names = Names(opened.family, table, held)
    spelled = {names.spelling[name]: dtype for name, dtype in held.items()}
    return {stored.name: spelled[theirs] for stored, theirs in zip(table, names.table, strict=True)}


def save_model(
    model: Any,
    directory: Path | str,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> None:
    """Write config.json, generation_config.json and safetensors, in shards where they are large, in `dtype` (None: the model's
    own; or one for each stored name).

    The special ids (of the tokenizer) are for other libraries' generation; ownlm reads them from the tokenizer.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    hf = model.hf or to_hf(model.config)
    family = FAMILIES[hf["model_type"]]
    ours = dict(model.named_parameters())
    table = stored_tensors(family.names(model.config), ours)
    one = next(iter(ours.values())).dtype if dtype is None or isinstance(dtype, Mapping) else dtype
    types = dtype if isinstance(dtype, Mapping) else {stored.name: one for stored in table}
    target = Counter(types.values()).most_common(1)[0][0]

    def pending(stored: Stored) -> Pending:
        kind = types[stored.name]
        return Pending(kind, stored.shape(ours), lambda: stored.pack(ours).to(kind))

    write_shards(root, {stored.name: pending(stored) for stored in table}, SHARD_BYTES)
    write_settings(model, root, target, bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)


def save_codes(
    model: Quantizable,
    directory: Path | str,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
) -> None:
    """`save_model` for a model that was quantised: NAME.codes and NAME.scales in place of NAME.weight, all under our names; what
    was not quantised in the model's dtype."""
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    write_shards(root, model.state_dict(), SHARD_BYTES)
    write_settings(
        model, root, model.dtype, bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
        quantization_config=coded.SETTINGS,
    )  # fmt: skip


def write_settings(
    model: Any,
    root: Path,
    dtype: torch.dtype,
    *,
    bos_token_id: int | None,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    quantization_config: Mapping[str, Any] | None = None,
) -> None:
    """config.json, generation_config.json and how a text's vector is made."""
    hf = model.hf or to_hf(model.config)
    eos = list(eos_token_id) if isinstance(eos_token_id, Sequence) else eos_token_id
    special = {"bos_token_id": bos_token_id, "eos_token_id": eos, "pad_token_id": pad_token_id}
    given = {key: value for key, value in special.items() if value is not None}
    kept = {key: value for key, value in hf.items() if key != "torch_dtype"}
    coded_by = {} if quantization_config is None else {"quantization_config": dict(quantization_config)}
    write_json(root / "config.json", special | kept | given | {"dtype": str(dtype).removeprefix("torch.")} | coded_by)
    starts = {key: kept[key] for key in ("decoder_start_token_id",) if kept.get(key) is not None}
    write_json(root / "generation_config.json", starts | given)
    if (pooling := getattr(model, "pooling", None)) is not None:  # models of images have none
        write_pooling(pooling, root, model.config.hidden_size)


def _names(table: Iterable[Stored]) -> list[str]:
    return [stored.name for stored in table]


def read_headers(root: Path) -> dict[Path, dict[str, Entry]]:
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
    names: Names, ours: Mapping[str, Tensor], files: Mapping[Path, Mapping[str, Entry]], root: Path, *, tied: bool
) -> None:
    """ArtifactError names the missing, unexpected and misshapen tensors; a `tied` head may be stored a second time."""
    held = {names.spelling[name]: entry for entries in files.values() for name, entry in entries.items()}
    faults = [f"tensor {name} is missing" for name in names.table if name not in held]
    faults += [
        f"tensor {name} is unexpected"
        for name, spelling in names.spelling.items()
        if spelling not in names.table and not names.derived(name) and names.copy_of(name, ours) is None
    ]
    for name, stored in names.table.items():
        if name in held:
            shape = stored.shape(ours)
            if held[name].shape != shape:
                faults.append(f"tensor {name} has shape {held[name].shape}, the config asks for {shape}")
            elif not held[name].dtype.is_floating_point:
                faults.append(f"tensor {name} holds {held[name].dtype}, not numbers with a fraction")
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ArtifactError("; ".join(faults[:5]) + more + ".", where=str(root))
