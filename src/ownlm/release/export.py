"""Take a model to other programs, and prove that it is still the same one.

    export(ref, to="gguf", quantization="Q4_K", out="model.gguf")     llama.cpp, and all that is built on it
    export(ref, to="hf", out="folder")                                transformers, vLLM, …

The result is loaded back as any stranger's file would be, and both models read the same tokens: what is reported is the largest
difference between their numbers and how often they would choose the same next token.
"""

import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor

from ownlm import device, gguf
from ownlm.artifact import Workspace
from ownlm.errors import NotFound, UserError
from ownlm.formats.settings import read_json
from ownlm.generate.checkpoint import open_checkpoint, tokenizer_of
from ownlm.models.decoder import Decoder
from ownlm.models.encoder import Encoder
from ownlm.models.gguf.write import QUANTIZATIONS, describe
from ownlm.models.weights import load_model, save_model
from ownlm.report import size
from ownlm.storage import flush, storage
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.gguf_write import to_gguf

Format: TypeAlias = Literal["gguf", "hf"]
FORMATS = ("gguf", "hf")
COMPARED_TOKENS = 256
FLOAT32_SHARE = 0.6  # of the free memory, for a model that is compared in float32
# What both models read where they have a tokenizer: prose, numbers, code, and a little of other languages.
TEXT = """The lighthouse keeper wrote down the weather every evening: wind from the west, 14 knots, rain by night. On the third of
March 1911 she added a sentence that nobody understood for sixty years. "Today," it said, "the sea was quiet, and I counted 27 ships."

def count(ships: list[str]) -> dict[str, int]:
    return {name: ships.count(name) for name in set(ships)}

Il fait beau. Это было давно. 海は静かだった。 The answer is 3 * (7 + 12) = 57, isn't it?
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """Where it is and how it compares, over `compared_tokens` places: the largest difference of a logit beside the largest logit,
    and the share of places where both models choose the same token. Of a model that writes nothing (`writes`), hidden states are
    compared instead, and the agreement is the cosine between both vectors of the text. `notes` tell what will differ elsewhere."""

    path: Path
    kind: Format
    architecture: str
    bytes: int
    compared_tokens: int
    max_difference: float
    max_value: float
    agreement: float
    writes: bool
    notes: tuple[str, ...]

    @property
    def told(self) -> str:
        """All of it in a sentence or two."""
        alike = (
            f"same choice at {self.agreement:.1%}"
            if self.writes
            else f"cosine of the text's vectors {self.agreement:.6f}"
        )
        return (
            f"{self.path}: {size(self.bytes)}, architecture {self.architecture}. Loaded back, over {self.compared_tokens} tokens: "
            f"largest difference {self.max_difference:.2g} (of {self.max_value:.3g}), {alike}."
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
    """Write a decoder or an encoder for other programs, and compare what was written with the original.

    ref           name, name@version, hf:owner/name, a Hugging Face directory or a GGUF file; an adapter comes with its base
    out           a file for "gguf", a new folder for "hf"
    quantization  for "gguf": F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K or Q4_0
    adapter       another adapter to merge into the model first
    Raises UserError when the format can't hold the model or its tokenizer, StorageFull when the disk can't.
    """
    path = Path(out)
    _check(path, to, quantization)
    found = open_checkpoint(ref, adapter=adapter, workspace=workspace or Workspace(device.home()))
    model, tokenizer, name = found.module, _tokenizer(found.path), found.name
    del found
    if not isinstance(model, Decoder | Encoder):
        raise UserError("only decoders and encoders of text can be exported.", where=str(ref))
    stored = next(model.parameters()).dtype
    count = sum(parameter.numel() for parameter in model.parameters())
    if 4 * count < FLOAT32_SHARE * device.free_memory_bytes():
        model = model.float()
    dtype = next(model.parameters()).dtype
    ids = _ids(model, tokenizer)
    ours = _numbers(model, ids)
    if to == "gguf":
        architecture, context, notes = _write_gguf(model, tokenizer, path, quantization, name)
    else:
        architecture, context, notes = _write_hf(model, tokenizer, path, stored)
    del model  # one in memory at a time
    ids, ours = ids[:context], ours[:context]
    again = load_model(path, dtype=dtype)
    theirs = _numbers(again, ids)
    choices = theirs.argmax(-1) == ours.argmax(-1)
    vectors = torch.nn.functional.cosine_similarity(theirs.mean(0), ours.mean(0), dim=0)
    return Exported(
        path=path,
        kind=to,
        architecture=architecture,
        bytes=sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*"))),
        compared_tokens=len(ids),
        max_difference=float((theirs - ours).abs().max()),
        max_value=float(ours.abs().max()),
        agreement=float(choices.float().mean() if _writes(again) else vectors),
        writes=_writes(again),
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
    model: Decoder | Encoder, tokenizer: Tokenizer | None, path: Path, quantization: str, name: str
) -> tuple[str, int, tuple[str, ...]]:
    """(architecture, how many tokens its context has, notes)"""
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
        metadata |= to_gguf(tokenizer, model.config.vocab_size)
    gguf.write(path, metadata, described.tensors)
    return described.architecture, int(cast(Any, described.metadata[f"{described.architecture}.context_length"])), notes


def _write_hf(
    model: Decoder | Encoder, tokenizer: Tokenizer | None, path: Path, dtype: torch.dtype
) -> tuple[str, int, tuple[str, ...]]:
    """The same for a directory, written whole or not at all."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    special: dict[str, Any] = {}
    try:
        with storage(path.parent):
            if tokenizer is not None:
                tokenizer.save(draft)
                special = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
                special["eos_token_id"] = sorted(tokenizer.stop_ids)
            save_model(model, draft, dtype=dtype, **special)
            draft.rename(path)
            flush(path.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    notes = () if tokenizer is not None else ("There is no tokenizer with the model.",)
    return str(read_json(path / "config.json")["model_type"]), model.config.max_tokens, notes


def _ids(model: Decoder | Encoder, tokenizer: Tokenizer | None) -> Tensor:
    """The tokens that are compared: of a text, or any."""
    most = min(COMPARED_TOKENS, model.config.max_tokens)
    if tokenizer is None:
        return torch.randint(0, model.config.vocab_size, (most,), generator=torch.Generator().manual_seed(0))
    return torch.tensor(tokenizer.document(TEXT)[:-1][:most])


@torch.inference_mode()
def _numbers(model: Decoder | Encoder, ids_T: Tensor) -> Tensor:
    """(T, V) logits of a decoder, (T, D) hidden states of an encoder, in float32."""
    hidden_TD: Tensor = model(ids_T[None])[0]
    return model.logits(hidden_TD) if _writes(model) else hidden_TD.float()


def _writes(model: Decoder | Encoder) -> TypeGuard[Decoder]:
    return isinstance(model, Decoder) and model.task is None
