"""A reference ─► what answers with that checkpoint: a `Model` of texts, or what another kind of model comes as (OPENERS)."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import torch

from ownlm import device as machine
from ownlm.artifact import Workspace
from ownlm.errors import UserError
from ownlm.generate.checkpoint import open_checkpoint
from ownlm.generate.model import Model
from ownlm.generate.seq2seq import Seq2Seq
from ownlm.generate.sight import Sight
from ownlm.generate.vision import ImageClassifier, ImageText
from ownlm.models.decoder import Decoder
from ownlm.models.dual import DualTower
from ownlm.models.encoder import Encoder
from ownlm.models.encoder_decoder import EncoderDecoder
from ownlm.models.vision import VisionTower
from ownlm.models.vision_language import VisionLanguage
from ownlm.report import Reporter
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.gguf import tokenizer_of

Loaded: TypeAlias = "Model | Seq2Seq | ImageText | ImageClassifier"


def load(
    ref: str | Path,
    *,
    adapter: str | Path | None = None,
    draft: str | Path | None = None,
    workspace: Workspace | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    tensor_parallel: int = 1,
) -> Loaded:
    """The model of a reference: name, name@version, a folder, a GGUF file, or hf:owner/name[@revision]. A `Model`, ready to
    generate; for an encoder-decoder a `Seq2Seq`, for CLIP an `ImageText`, for ViT an `ImageClassifier`. An adapter comes with its
    base.

    adapter  another adapter to merge into the model: a reference, or a directory in PEFT's format
    draft    a small decoder of the same vocabulary that writes ahead for it: the same text, sooner where that pays
    dtype    of the weights; None: on a CPU float32, the exact choice; elsewhere what `device.compute_dtype` names, the fast one
    tensor_parallel  processes of this machine that the model is split over, one for each GPU
    Raises NotFound, ArtifactError when a file is damaged or missing, UserError for a part that does nothing by itself.
    """
    workspace = workspace or Workspace(machine.home(), Reporter(out=sys.stderr))
    where = machine.torch_device(device)
    found = open_checkpoint(
        ref,
        adapter=adapter,
        workspace=workspace,
        device=where,
        dtype=dtype or (torch.float32 if where.type == "cpu" else machine.compute_dtype(where)),
        for_kernels=True,
        tensor_parallel=tensor_parallel,
    )
    module = found.module
    if type(module) not in OPENERS:
        kind = module.hf["model_type"]
        raise UserError(f"a model of type {kind} doesn't write or answer anything by itself.", where=str(ref))
    about: dict[str, Any] = {"name": found.name, "ref": found.ref, "digest": found.digest}
    if found.unread is not None:
        about["unread"] = found.unread
    if found.ranks is not None:
        about["ranks"] = found.ranks
    model: Loaded = OPENERS[type(module)](module, found.path, **about)
    if draft is not None:
        if not isinstance(model, Model):
            raise UserError("only a decoder can have a model that drafts for it.", where=str(ref))
        model.draft_with(load_decoder(draft, workspace=workspace, device=device, dtype=dtype))
    return model


class How(TypedDict, total=False):
    """The keywords of `load`."""

    adapter: str | Path | None
    draft: str | Path | None
    workspace: Workspace | None
    device: str | None
    dtype: torch.dtype | None
    tensor_parallel: int


def load_writer(ref: str | Path, **how: Unpack[How]) -> "Model | Seq2Seq":
    """`load` where only a model of texts will do. Raises UserError for any other."""
    model = load(ref, **how)
    if not isinstance(model, Model | Seq2Seq):
        raise UserError("this model looks at images and writes nothing.", where=str(ref), cure="Use `ownlm.load(…)`.")
    return model


def load_decoder(ref: str | Path, **how: Unpack[How]) -> "Model":
    """`load` where only a decoder will do. Raises UserError for any other."""
    model = load_writer(ref, **how)
    if not isinstance(model, Model):
        raise UserError(
            "this is an encoder-decoder, which rewrites one text; a decoder is needed here.",
            where=str(ref),
            cure="Use `ownlm generate`, or `ownlm.load(…).generate(…)`.",
        )
    return model


def _text(module: Decoder | Encoder, path: Path, **about: Any) -> Model:
    return Model(module, tokenizer_of(path), **about)


def _rewriter(module: EncoderDecoder, path: Path, **about: Any) -> Seq2Seq:
    return Seq2Seq(module, tokenizer_of(path), **about)


def _seeing(module: VisionLanguage, path: Path, **about: Any) -> Model:
    tokenizer = Tokenizer.load(path)
    return Model(module.language, tokenizer, sight=Sight.load(module, path, tokenizer), **about)


# What a loaded model comes as.
OPENERS: dict[type, Callable[..., Loaded]] = {
    Decoder: _text,
    Encoder: _text,
    EncoderDecoder: _rewriter,
    VisionLanguage: _seeing,
    DualTower: ImageText.load,
    VisionTower: ImageClassifier.load,
}
