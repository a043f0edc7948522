"""Directories that `ownlm quantize` writes: a model's matrices as codes and scales, under the names of our modules.

    config.json         that of the model, and quantization_config = {"quant_method": "ownlm", …}
    model.safetensors   NAME.codes and NAME.scales (quantization/codes.py) for each matrix, everything else as it was

The file is the quantised model's own state: opening it is mapping it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ownlm.checkpoints.pooling import read_pooling
from ownlm.errors import ArtifactError
from ownlm.formats.tensorfile import Entry, Mapped
from ownlm.models.blank import blank
from ownlm.models.decoder import Decoder
from ownlm.models.encoder import Encoder
from ownlm.models.families import from_hf
from ownlm.quantization.calibrate import Quantizable, matrices, quantizable
from ownlm.quantization.codes import GROUP, Codes, Scheme, empty, plain, quantized

SETTINGS = {"quant_method": "ownlm", "group": GROUP}
SCHEMES: dict[torch.dtype, Scheme] = {torch.int8: "int8", torch.uint8: "int4", torch.float8_e4m3fn: "fp8"}
CODED = (".codes", ".scales", ".minimums")


def is_quantised(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a directory."""
    about = hf.get("quantization_config")
    return isinstance(about, dict) and about.get("quant_method") == SETTINGS["quant_method"]


def describe(root: Path, hf: Mapping[str, Any], files: Mapping[Path, Mapping[str, Entry]]) -> Quantizable:
    """The quantised model without its weights. ArtifactError for a directory of another format; missing, unexpected or wrongly shaped
    tensors."""
    where = str(root)
    if hf["quantization_config"] != SETTINGS:
        raise ArtifactError(
            "its quantization_config is of another format.", where=where, cure="Update ownlm, or quantise it again."
        )
    hf = {key: value for key, value in hf.items() if key != "quantization_config"}
    entries = {name: entry for held in files.values() for name, entry in held.items()}
    config, family = from_hf(hf, where=f"{root / 'config.json'}", stored=frozenset(_told(entries)))
    with blank():
        model: Any = family.build(config, hf)
        if not quantizable(model):
            raise ArtifactError(f"a model of type {hf.get('model_type')} is never quantised.", where=where)
        for name in matrices(model):
            model.set_submodule(name, quantized(model.get_submodule(name), partial(_blank, entries, name)))
    _match(model.state_dict(), entries, where)
    model.requires_grad_(False)
    if isinstance(model, Decoder | Encoder):
        model.pooling = read_pooling(root)
    return model.eval()


def load(
    root: Path,
    hf: Mapping[str, Any],
    files: Mapping[Path, Mapping[str, Entry]],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    codes: bool,
) -> Quantizable:
    """See `load_model`. The same errors as `describe`."""
    model = describe(root, hf, files)
    fill(model, [Mapped(path, held) for path, held in files.items()], dtype)
    if not codes:
        for name in matrices(model):
            model.set_submodule(name, plain(model.get_submodule(name), dtype or torch.float32))
        model.requires_grad_(True)
        if dtype is None:
            model.float()
    return model.to(device)


def fill(model: Quantizable, maps: Sequence[Mapped], dtype: torch.dtype | None) -> None:
    """Codes and scales as views of the files, everything else in `dtype` (None: that of the first of it)."""
    tensors = {name: one.tensor(name) for one in maps for name in one.entries}
    kept = dtype or next(tensor.dtype for name, tensor in tensors.items() if not name.endswith(CODED))
    parameters = dict(model.named_parameters())
    placed = {name: tensor.to(kept, copy=True) if name in parameters else tensor for name, tensor in tensors.items()}
    model.load_state_dict(placed, assign=True)
    model.requires_grad_(False)


# Some configs don't say which heads there are. Then families ask for a tensor by the name that it has elsewhere.
ELSEWHERE = {
    "lm_head.codes": ("lm_head.weight",),
    "head.norm.weight": ("cls.predictions.transform.dense.weight", "lm_head.dense.weight", "vocab_transform.weight"),
    "next_sentence.weight": ("cls.seq_relationship.weight",),
}


def _told(entries: Iterable[str]) -> Iterator[str]:
    for name in entries:
        yield from ELSEWHERE.get(name, (name,))


def _blank(entries: Mapping[str, Entry], name: str, weight: Tensor, part: str) -> Codes:
    """The codes of a matrix by what the file holds; int8 where it holds none, which `_match` tells."""
    name = f"{name}.{part}" if part else name
    stored = entries.get(f"{name}.codes")
    scheme = "int8" if stored is None else SCHEMES.get(stored.dtype, "int8")
    return empty("uint4" if f"{name}.minimums" in entries else scheme, tuple(weight.shape))


def _match(ours: Mapping[str, Tensor], entries: Mapping[str, Entry], where: str) -> None:
    faults = [f"tensor {name} is missing" for name in ours if name not in entries]
    faults += [f"tensor {name} is unexpected" for name in entries if name not in ours]
    for name, tensor in ours.items():
        entry = entries.get(name)
        if entry is None:
            continue
        is_code = name.endswith(CODED)
        if entry.shape != tuple(tensor.shape):
            faults.append(f"tensor {name} has shape {entry.shape}, the config asks for {tuple(tensor.shape)}")
        elif entry.dtype != tensor.dtype if is_code else not entry.dtype.is_floating_point:
            faults.append(f"tensor {name} holds {entry.dtype}")
    if faults:
        more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
        raise ArtifactError("; ".join(faults[:5]) + more + ".", where=where)
