"""The stage: a checkpoint in, the same one in integers or floats of 8 bits out, with what that cost.

    checkpoint ─ its documents' texts ─► codes and scales, layer by layer ─► a checkpoint artifact
                └ held-out ones ───────► perplexity, KL divergence, top-1 agreement of both; likeness of an encoder's states

Decoders are calibrated; encoders and encoder-decoders are rounded to the nearest values, which needs no text.

Calibration text is what the checkpoint learned from: the documents of its lineage, rendered by its template where it was tuned to chat.
A checkpoint of elsewhere has none; then documents or a file of text are named.

Shapes: N rows, T tokens of each, V vocabulary.
"""

import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ownlm.artifact import Artifact, Workspace
from ownlm.checkpoints.coded import is_quantised
from ownlm.checkpoints.weights import save_codes
from ownlm.errors import UserError
from ownlm.formats.settings import read_json
from ownlm.generate.checkpoint import base_of, open_checkpoint
from ownlm.kernels.native import NativeDecoder, text_logits, unsupported
from ownlm.lineage import lineage
from ownlm.models.decoder import Decoder, DecoderConfig
from ownlm.models.families import from_hf
from ownlm.quantization.calibrate import quantizable, quantize_decoder, quantize_rest
from ownlm.records import Conversation, Document, read_jsonl
from ownlm.release.likeness import Likeness, likeness
from ownlm.report import Reporter, duration, quantity, size
from ownlm.storage import sha256
from ownlm.tokens.codec import Tokenizer

Precision = Literal["int8", "int4", "fp8"]
Method = Literal["gptq", "rtn"]
MAX_CONTEXT = 2048  # tokens of a row of calibration
HELD_OUT_TOKENS = 32_768
CHARACTERS_PER_TOKEN = 6  # more than most texts have
HELD_OUT_SHARE = 0.1  # of a file of text


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRecipe:
    """What to make of which checkpoint.

    method     gptq: calibrated on `documents`; rtn: every weight to the nearest value, no text needed; none: gptq for decoders, else rtn
    documents  a documents artifact or a file of text; none: what the checkpoint was made from. `sha256` pins a file's content
    tokens     of calibration
    """

    name: str
    checkpoint: str
    to: Precision
    method: Method | None = None
    documents: str | None = None
    sha256: str | None = None
    tokens: int = 32_768
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError("tokens must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Over `tokens` of held-out text: nats per token before and after, by how much the perplexity rose, the mean KL divergence from the
    original's distribution in nats, and how often both think the same token the likeliest. `computed_by` says what ran the codes."""

    tokens: int
    nats_before: float
    nats_after: float
    perplexity_rise: float
    kl: float
    agreement: float
    computed_by: str


def quantize(recipe: QuantizeRecipe, workspace: Workspace, reporter: Reporter) -> Artifact:
    """The checkpoint artifact in codes. UserError for a model of images, one quantised already, or no text to calibrate on."""
    began = time.monotonic()
    source = workspace.open(recipe.checkpoint, ("checkpoint", "adapter"))
    recipe = replace(recipe, method=method_of(recipe, source, workspace))
    texts = calibration_texts(recipe, source, workspace)
    if isinstance(texts, Path):
        recipe = replace(recipe, documents=str(texts), sha256=sha256(texts))
    inputs = {"checkpoint": source} | ({"documents": texts} if isinstance(texts, Artifact) else {})
    if found := workspace.find(recipe.name, kind="checkpoint", inputs=inputs, recipe=recipe, seed=recipe.seed):
        reporter.line(f"{found.ref} is already there.")
        return found
    opened = open_checkpoint(source.path, workspace=workspace)
    model, tokenizer = opened.module, Tokenizer.load(opened.path)
    if not quantizable(model):
        raise UserError(
            "only models that read or write text are quantised, decoders without another head.", where=source.ref
        )
    if is_quantised(read_json(opened.path / "config.json")):
        raise UserError("this is quantised already.", where=source.ref, cure="Name the checkpoint it was made from.")
    chat = tokenizer.template is not None and source.manifest.recipe.get("task") == "chat"
    width = min(model.config.max_tokens, MAX_CONTEXT)
    calibration = held_out = None
    if texts is not None:
        held_out = rows(read(texts, width, chat=chat, held_out=True), tokenizer, width, HELD_OUT_TOKENS, recipe.seed)
        if recipe.method == "gptq":
            calibration = rows(
                read(texts, width, chat=chat, held_out=False), tokenizer, width, recipe.tokens, recipe.seed
            )
            if calibration is None:
                raise UserError(f"there is less text than one context of {width} tokens.", where=str(recipe.documents))
    weights = sum(parameter.numel() for parameter in model.parameters())

    def progress(done: int, all: int) -> None:
        reporter.status(f"{recipe.name}: {done} of {all} layers, {duration(time.monotonic() - began)}")

    if isinstance(model, Decoder):
        quantize_decoder(model, recipe.to, calibration, progress)
    else:
        quantize_rest(model, recipe.to, progress)
    with workspace.create("checkpoint", recipe.name, inputs=inputs, recipe=recipe, seed=recipe.seed) as draft:
        save_codes(
            model, draft.path,
            bos_token_id=tokenizer.bos_id, eos_token_id=sorted(tokenizer.stop_ids), pad_token_id=tokenizer.pad_id,
        )  # fmt: skip
        tokenizer.save(draft.path)
        stored = sum(file.stat().st_size for file in draft.path.glob("*.safetensors"))
        draft.facts["quantization"] = {
            "to": recipe.to,
            "method": recipe.method,
            "calibration_tokens": 0 if calibration is None else calibration.numel(),
            "bits_per_weight": round(8 * stored / weights, 3),
        }
        if held_out is not None:
            reporter.status(f"{recipe.name}: comparing with the original on held-out text")
            original = open_checkpoint(source.path, workspace=workspace).module
            cost: Cost | Likeness
            if isinstance(model, Decoder):
                cost = compare(original, model, held_out)
            else:
                cost = likeness(original, model, held_out)
            draft.facts["held_out"] = asdict(cost)
    tell(draft.done, source, draft.facts, time.monotonic() - began, reporter)
    return draft.done


def tell(made: Artifact, source: Artifact, facts: Mapping[str, Any], seconds: float, reporter: Reporter) -> None:
    """The outcome, for people and for programs."""
    about = facts["quantization"]
    reporter.line(
        f"{made.ref}: {about['to']} by {about['method']}, {about['bits_per_weight']:.2f} bits per weight, {size(made.bytes)} "
        f"(the original {size(source.bytes)}), in {duration(seconds)}"
    )
    held = facts.get("held_out")
    if held and "cosine" in held:
        reporter.line(
            f"on held-out text the final states' cosine with the original's is {held['cosine']:.5f} (of the least alike row "
            f"{held['lowest']:.5f}), over {quantity(held['tokens'])} tokens, computed by {held['computed_by']}"
        )
    elif held:
        reporter.table(
            ["on held-out text", "original", made.ref],
            [
                ["nats per token", f"{held['nats_before']:.4f}", f"{held['nats_after']:.4f}"],
                ["perplexity", f"{math.exp(held['nats_before']):.3f}", f"{math.exp(held['nats_after']):.3f}"],
                ["perplexity rises by", "", f"{held['perplexity_rise']:+.2%}"],
                ["KL divergence", "", f"{held['kl']:.5f}"],
                ["same likeliest token", "", f"{held['agreement']:.1%}"],
            ],
        )
        reporter.line(f"over {quantity(held['tokens'])} tokens, computed by {held['computed_by']}")
    reporter.event("quantized", ref=made.ref, path=made.path, bytes=made.bytes, seconds=seconds, **facts)


def method_of(recipe: QuantizeRecipe, source: Artifact, workspace: Workspace) -> Method:
    """The one asked for, or the better of those there are. UserError for a calibrated encoder."""
    folder = (base_of(source, workspace) if source.kind == "adapter" else source).path
    hf = read_json(folder / "config.json")
    config, _ = from_hf({key: value for key, value in hf.items() if key != "quantization_config"}, where=source.ref)
    if isinstance(config, DecoderConfig):
        return recipe.method or "gptq"
    if recipe.method == "gptq":
        raise UserError("only decoders are calibrated.", where=source.ref, cure="Round to the nearest: --method rtn.")
    return "rtn"


@torch.inference_mode()
def compare(original: Decoder, quantised: Decoder, rows_NT: Tensor) -> Cost:
    """What the codes cost on text, computed as they will be: by the kernels, whose activations are integers too, where they run here."""
    native = NativeDecoder(quantised) if unsupported(quantised) is None else None
    before = after = kl = 0.0
    same = 0
    for tokens_T in rows_NT:
        ours_TV = original.logits(original(tokens_T[None]))[0, :-1].log_softmax(-1)
        logits_TV = quantised.logits(quantised(tokens_T[None]))[0] if native is None else text_logits(native, tokens_T)
        theirs_TV = logits_TV[:-1].log_softmax(-1)
        next_T1 = tokens_T[1:, None]
        before -= ours_TV.gather(1, next_T1).sum().item()
        after -= theirs_TV.gather(1, next_T1).sum().item()
        kl += (ours_TV.exp() * (ours_TV - theirs_TV)).sum().item()
        same += int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum())
    count = rows_NT[:, 1:].numel()
    return Cost(
        tokens=count,
        nats_before=before / count,
        nats_after=after / count,
        perplexity_rise=math.expm1((after - before) / count),
        kl=kl / count,
        agreement=same / count,
        computed_by="PyTorch" if native is None else f"the {native.instruction_set} kernels",
    )


def rows(
    texts: Iterable[str | Conversation], tokenizer: Tokenizer, width: int, tokens: int, seed: int
) -> Tensor | None:
    """(N, T) ids of about `tokens` tokens: texts drawn by chance, joined and cut into rows of `width`. None: not one row."""
    draw = random.Random(seed)
    kept: list[str | Conversation] = []
    most = max(64, 4 * tokens // width)
    for seen, text in enumerate(texts):  # each has the same chance, without all being in memory
        if len(kept) < most:
            kept.append(text)
        elif (place := draw.randrange(seen + 1)) < most:
            kept[place] = text
    draw.shuffle(kept)
    ids: list[int] = []
    for text in kept:
        if len(ids) >= tokens:
            break
        whole = tokenizer.chat(text.messages)[0] if isinstance(text, Conversation) else tokenizer.document(text)[:-1]
        ids += whole[:width]
    count = min(len(ids), max(width, tokens)) // width
    return torch.tensor(ids[: count * width]).view(count, width) if count else None


def calibration_texts(recipe: QuantizeRecipe, source: Artifact, workspace: Workspace) -> Artifact | Path | None:
    """Where text is, or None where it isn't needed."""
    if recipe.documents is not None:
        path = Path(recipe.documents)
        return path if path.is_file() else workspace.open(recipe.documents, "documents")
    history = lineage(workspace, source)
    known = [
        one.artifact for one in sorted(history, key=lambda one: one.depth) if one.kind == "documents" and one.artifact
    ]
    if not known and recipe.method != "rtn":
        raise UserError(
            "the documents it was made from aren't here, and calibration needs text like what it will write.",
            where=source.ref,
            cure="Name documents or a file of text (--documents), or round to the nearest: --method rtn.",
        )
    return known[0] if known else None


def read(texts: Artifact | Path, width: int, *, chat: bool, held_out: bool) -> Iterator[str | Conversation]:
    """Texts, cut into pieces that fill about a row; conversations where the model was tuned on them."""
    if isinstance(texts, Path):
        try:
            text = texts.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise UserError(f"this can't be read as text: {fault}.", where=str(texts)) from None
        cut = int(len(text) * (1 - HELD_OUT_SHARE))
        yield from _pieces(text[cut:] if held_out else text[:cut], width)
        return
    splits = ("test", "validation") if held_out else ("train",)
    for split in [name for name in splits if texts.has(f"{name}.jsonl")][:1]:
        for document in read_jsonl(texts.file(f"{split}.jsonl"), Document):
            yield from _pieces(document.text, width)
    talks = "conversations_validation.jsonl" if held_out else "conversations.jsonl"
    if chat and texts.has(talks):
        yield from read_jsonl(texts.file(talks), Conversation)


def _pieces(text: str, width: int) -> Iterator[str]:
    length = width * CHARACTERS_PER_TOKEN
    return (text[at : at + length] for at in range(0, len(text), length))


def settings(
    ref: str | Path,
    *,
    to: Precision,
    method: Method | None = None,
    documents: str | Path | None = None,
    name: str | None = None,
    workspace: Workspace,
) -> QuantizeRecipe:
    """The recipe of a call; the artifact is called after its checkpoint unless `name` says otherwise."""
    source = workspace.open(ref, ("checkpoint", "adapter"))
    return QuantizeRecipe(
        name=name or f"{source.name}-{to}",
        checkpoint=source.ref,
        to=to,
        method=method,
        documents=None if documents is None else str(documents),
    )
