"""Take a model to other programs, and prove that it is still the same one.

    export(ref, to="gguf", quantization="Q4_K", out="model.gguf")     llama.cpp, and all that is built on it
    export(ref, to="hf", out="folder")                                transformers, vLLM, …

The result is loaded back as any stranger's file would be, and both models read the same text or images: what is reported is the
largest difference between their numbers and how often they would choose the same (compare.py).
"""

import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch

from ownlm import device, gguf
from ownlm.artifact import Workspace
from ownlm.checkpoints.gguf.write import QUANTIZATIONS, describe
from ownlm.checkpoints.weights import load_model, save_model, stored_dtypes
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.formats.settings import read_json, write_json
from ownlm.generate.checkpoint import open_checkpoint
from ownlm.models.decoder import Decoder
from ownlm.models.dual import DualTower
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder
from ownlm.models.vision import VisionTower
from ownlm.models.vision_language import VisionLanguage
from ownlm.release.compare import Comparison, compare, numbers, sample
from ownlm.report import size
from ownlm.storage import flush, storage
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.gguf import tokenizer_of
from ownlm.tokens.gguf_write import to_gguf

Format: TypeAlias = Literal["gguf", "hf"]
Types: TypeAlias = torch.dtype | Mapping[str, torch.dtype]
FORMATS = ("gguf", "hf")
FLOAT32_SHARE = 0.6  # of the free memory, for a model that is compared in float32
# Beside a model and its tokenizer: how other programs are to generate, and how images are prepared.
SETTINGS = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Where it is and how it compares with the original, over so many tokens and images; `notes` tell what will differ elsewhere."""

    path: Path
    kind: Format
    architecture: str
    bytes: int
    compared_tokens: int
    compared_images: int
    comparison: Comparison
    notes: tuple[str, ...]

    @property
    def told(self) -> str:
        """All of it in a sentence or two."""
        counts = {"tokens": self.compared_tokens, "images": self.compared_images}
        over, found = " and ".join(f"{count} {name}" for name, count in counts.items() if count), self.comparison
        alike = f"same choice at {found.agreement:.1%}" if found.chooses else f"cosine of vectors {found.agreement:.6f}"
        return (
            f"{self.path}: {size(self.bytes)}, architecture {self.architecture}. Loaded back, over {over}: "
            f"largest difference {found.max_difference:.2g} (of {found.max_value:.3g}), {alike}."
        )


def export(
    ref: str | Path,
    *,
    out: str | Path,
    to: Format = "gguf",
    quantization: str = "Q8_0",
    adapter: str | Path | None = None,
    workspace: Workspace | None = None,
) -> Exported:
    """Write a model of any family for other programs, and compare what was written with the original.

    ref           name, name@version, hf:owner/name, a Hugging Face directory or a GGUF file; an adapter comes with its base
    out           a file for "gguf", a new folder for "hf"
    quantization  for "gguf": F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K or Q4_0
    adapter       another adapter to merge into the model first
    Raises UserError when the format can't hold the model or its tokenizer, StorageFull when the disk can't.
    """
    path = Path(out)
    _check(path, to, quantization)
    found = open_checkpoint(ref, adapter=adapter, workspace=workspace or Workspace(device.home()))
    model, source, name = found.module, found.path, found.name
    tokenizer = _tokenizer(source)
    stored: Types = next(model.parameters()).dtype
    if source.is_dir() and not found.merged:
        stored = stored_dtypes(source, model)
    del found
    count = sum(parameter.numel() for parameter in model.parameters())
    if 4 * count < FLOAT32_SHARE * device.free_memory_bytes():
        model = model.float()
    dtype = next(model.parameters()).dtype
    read = sample(model, tokenizer)
    if to == "gguf":
        architecture, context, notes = _write_gguf(model, tokenizer, path, quantization, name)
        read = read.first(context)
    else:
        architecture, notes = _write_hf(model, tokenizer, source, path, stored)
    ours = numbers(model, read)
    del model  # one in memory at a time
    return Exported(
        path=path,
        kind=to,
        architecture=architecture,
        bytes=sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*"))),
        compared_tokens=len(read.ids),
        compared_images=len(read.images),
        comparison=compare(ours, numbers(load_model(path, dtype=dtype), read)),
        notes=notes,
    )


def _check(path: Path, to: str, quantization: str) -> None:
    if to not in FORMATS:
        raise UserError(f"{to!r} is no format.", where="to", cure=f"There are: {', '.join(FORMATS)}.")
    if quantization not in QUANTIZATIONS:
        raise UserError(
            f"{quantization!r} is none.", where="quantization", cure=f"There are: {', '.join(QUANTIZATIONS)}."
        )
    if to == "hf" and path.exists():
        raise UserError("there is something of that name already.", where=str(path), cure="Name a new folder.")
    if to == "gguf" and (path.is_dir() or path.suffix != ".gguf"):
        raise UserError("this isn't the name of a GGUF file.", where=str(path), cure="Let it end in .gguf.")
    if not path.parent.is_dir():
        raise NotFound("there is no such folder.", where=str(path.parent))


def _tokenizer(source: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer; None for a bare model."""
    if source.is_file() and gguf.read(source).metadata.get("tokenizer.ggml.model") in ("none", "no_vocab"):
        return None
    try:
        return tokenizer_of(source)
    except NotFound:
        return None


def _write_gguf(
    model: Any, tokenizer: Tokenizer | None, path: Path, quantization: str, name: str
) -> tuple[str, int, tuple[str, ...]]:
    """(architecture, how many tokens its context has, notes)"""
    if not isinstance(model, Decoder | Encoder | EncoderDecoder):
        kind = model.hf["model_type"]
        raise UserError(f"a model of type {kind} can't be written as GGUF.", where=name, cure='Export it with to="hf".')
    described = describe(model, QUANTIZATIONS[quantization])
    metadata: dict[str, gguf.Value] = {
        "general.architecture": described.architecture,
        "general.type": "model",
        "general.name": name,
        "general.file_type": np.uint32(QUANTIZATIONS[quantization].code),
        "general.quantization_version": np.uint32(2),
        **described.metadata,
    }
    notes = described.notes
    if tokenizer is None:
        metadata["tokenizer.ggml.model"] = "none"
        notes = (*notes, "There is no tokenizer with the model: the file takes token ids only.")
    else:
        metadata |= to_gguf(tokenizer, model.config.vocab_size, ends=not isinstance(model, Decoder))
    gguf.write(path, metadata, described.tensors)
    return described.architecture, int(cast(Any, described.metadata[f"{described.architecture}.context_length"])), notes


def _write_hf(
    model: Any, tokenizer: Tokenizer | None, source: Path, path: Path, dtype: Types
) -> tuple[str, tuple[str, ...]]:
    """(architecture, notes) of a directory that is written whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    kept = {name: read_json(source / name) for name in SETTINGS if (source / name).is_file()}
    special: dict[str, Any] = {}
    if tokenizer is not None and SETTINGS[0] not in kept:
        special = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
        special["eos_token_id"] = sorted(tokenizer.stop_ids)
    try:
        with storage(path.parent):
            save_model(model, draft, dtype=dtype, **special)
            for name, fields in kept.items():
                write_json(draft / name, fields)
            if tokenizer is not None:
                tokenizer.save(draft)
                if Tokenizer.load(draft).digest != tokenizer.digest:
                    raise ArtifactError("the tokenizer that was written reads back as another one.", where=str(source))
            draft.rename(path)
            flush(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    missing = []
    if tokenizer is None and not isinstance(model, VisionTower):
        missing.append("There is no tokenizer with the model.")
    if isinstance(model, VisionTower | DualTower | VisionLanguage) and not kept.keys() & set(SETTINGS[1:]):
        missing.append("There is no preprocessor_config.json with the model, which says how images are prepared.")
    return str(read_json(path / "config.json")["model_type"]), tuple(missing)
