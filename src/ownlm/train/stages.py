"""The two training stages: pretrain (documents -> base model) and finetune (base model + conversations -> chat model).

    documents ─┐         (teacher) ─┐
    tokenizer ─┴► tokens ───────────┴► pretrain ─► checkpoint ─┐
    conversations ─────────────────────────────────────────────┴► finetune ─► checkpoint

A checkpoint is a Hugging Face directory (config.json, model.safetensors, tokenizer) with the training curve beside it.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch

from ownlm import device
from ownlm.artifact import Artifact, Workspace, fingerprint, storage, write_atomic
from ownlm.errors import UserError
from ownlm.models.decoder import Decoder, DecoderConfig, uniform
from ownlm.models.specs import Attention, FeedForward, Rotary
from ownlm.models.weights import load_model, save_model
from ownlm.records import Conversation, read_jsonl
from ownlm.report import Reporter, duration, quantity
from ownlm.tokens.batches import UNTRAINED, Batches, ConversationRows, DocumentRows, Micro, validation_conversations
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.examples import Made
from ownlm.tokens.shards import Shard, TokensRecipe, open_shard, tokenize
from ownlm.train.loop import Settings, Work, return_freed_memory, train, validate
from ownlm.train.objectives import OBJECTIVES, Distillation, Objective
from ownlm.train.optimizers import Optimizer
from ownlm.train.pretraining import CausalLM, Learning, corruption_of, data, learning, new_model
from ownlm.train.schedule import Schedule

Precision = Literal["auto", "bf16", "fp32"]
Sample = Callable[[Decoder, Tokenizer], str]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VALIDATION_TOKENS = 32_768  # of one validation during training; the last one reads every held-out document
MICRO_TOKENS = 8_192  # of a micro-batch: what bounds the memory of activations


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A Qwen3-like decoder: RMSNorm, rotary positions, QK-norm, SwiGLU, no biases."""

    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 6
    num_kv_heads: int = 6
    head_dim: int = 32
    intermediate_size: int = 512
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if min(self.hidden_size, self.num_layers, self.num_heads, self.num_kv_heads, self.intermediate_size) < 1:
            raise ValueError("sizes and counts start at 1")
        if self.num_heads % self.num_kv_heads or self.head_dim % 2 or self.head_dim < 2:
            raise ValueError("num_heads must be a multiple of num_kv_heads, and head_dim even")

    def config(self, vocab_size: int, context: int) -> DecoderConfig:
        return uniform(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            max_tokens=context,
            attention=Attention(
                num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, qk_norm=True
            ),
            mlp=FeedForward(size=self.intermediate_size),
            rotary=Rotary(theta=self.rope_theta),
            tie_embeddings=self.tie_embeddings,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainRecipe:
    """A base model from documents. Its shape is `model`, or for any family ownlm knows `hf`, a Hugging Face config.json as a table
    (model_type = "bert", hidden_size = 256, …; the vocabulary's size and special ids come from the tokenizer).

    `batch_tokens` are those of one step, of which `micro_rows` rows of `context` tokens are computed at once (None: as many
    as fit 8,192 tokens). `document_mask` keeps packed documents from seeing each other (causal_lm and distillation only)."""

    name: str
    documents: str
    tokenizer: str
    objective: Learning = field(default_factory=CausalLM)
    model: ModelShape | None = None
    hf: dict[str, Any] | None = None
    context: int = 256
    batch_tokens: int = 2_048
    micro_rows: int | None = None
    steps: int = 1_000
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    document_mask: bool = False
    precision: Precision = "auto"
    validate_every: int | None = 200
    checkpoint_every: int | None = 200
    seed: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.model is not None and self.hf is not None:
            raise ValueError("model and hf both give a shape: keep one of them")
        if self.document_mask and corruption_of(self.objective) is not None:
            raise ValueError(f"document_mask is for next-token prediction, not for {self.objective.kind}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneRecipe:
    """A chat model from a checkpoint and the conversations of a documents artifact. `document_share` of the rows are
    documents again, so that what was read is not forgotten. `context` None: the checkpoint's."""

    name: str
    checkpoint: str
    documents: str
    document_share: float = 0.0
    context: int | None = None
    batch_tokens: int = 2_048
    micro_rows: int | None = None
    steps: int = 300
    optimizer: Optimizer = field(
        default_factory=lambda: Optimizer(lr=0.01, embedding_lr=0.005, head_lr=0.0025, vector_lr=0.005)
    )
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = "auto"
    validate_every: int | None = 100
    checkpoint_every: int | None = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self)
        if not 0 <= self.document_share < 1:
            raise ValueError("document_share is at least 0 and less than 1")


def pretrain(
    recipe: PretrainRecipe, workspace: Workspace, reporter: Reporter, *, sample: Sample | None = None
) -> Artifact:
    """A checkpoint artifact: a base model trained on the documents. Continues a run that was stopped.

    `sample(model, tokenizer)` says something with the model as it is; it is shown now and then.
    """
    source = workspace.open(recipe.tokenizer)
    tokens = tokenize(
        TokensRecipe(name=f"{recipe.name}-tokens", documents=recipe.documents, tokenizer=recipe.tokenizer),
        workspace,
        reporter,
    )
    inputs = {"tokens": tokens, "tokenizer": source}
    if isinstance(recipe.objective, Distillation):
        inputs["teacher"] = workspace.open(recipe.objective.teacher, "checkpoint")
    if found := workspace.find(recipe.name, kind="checkpoint", inputs=inputs, recipe=recipe, seed=recipe.seed):
        return found
    tokenizer = Tokenizer.load(source.path)
    model = new_model(
        recipe.objective,
        hf=recipe.hf,
        shape=(recipe.model or ModelShape()).config(tokenizer.vocab_size, recipe.context),
        tokenizer=tokenizer,
        context=recipe.context,
        seed=recipe.seed,
        where=recipe.name,
    )
    learn, judge = learning(recipe.objective, model, inputs.get("teacher"), tokenizer, reporter)
    rows = max(1, recipe.batch_tokens // recipe.context)
    prepared = data(
        recipe.objective,
        tokens,
        tokenizer,
        model,
        context=recipe.context,
        rows=rows,
        micro_rows=_micro_rows(recipe.micro_rows, rows, recipe.context),
        document_mask=recipe.document_mask,
        seed=recipe.seed,
    )
    return _run(
        recipe.objective.kind,
        recipe,
        workspace,
        reporter,
        inputs,
        tokenizer,
        model,
        prepared.batches,
        prepared.everything,
        sample if isinstance(model, Decoder) else None,
        held_out=prepared.held_out,
        learn=learn,
        judge=judge,
    )


def finetune(
    recipe: FinetuneRecipe, workspace: Workspace, reporter: Reporter, *, sample: Sample | None = None
) -> Artifact:
    """A checkpoint artifact: the checkpoint tuned on conversations, of which only the assistant's words are learned.

    Before the first step the first conversation is shown with what is trained in it, and kept as mask.txt.
    """
    base = workspace.open(recipe.checkpoint, "checkpoint")
    source = workspace.open(recipe.documents, "documents")
    inputs = {"checkpoint": base, "documents": source}
    if found := workspace.find(recipe.name, kind="checkpoint", inputs=inputs, recipe=recipe, seed=recipe.seed):
        return found
    tokenizer = Tokenizer.load(base.path)
    model = load_model(base.path, dtype=torch.float32)
    context = recipe.context or model.config.max_tokens
    if context > model.config.max_tokens:
        raise UserError(
            f"the context of {context} tokens is longer than the checkpoint's {model.config.max_tokens}.",
            where=recipe.name,
            cure=f"Set context to at most {model.config.max_tokens}.",
        )
    conversations = _conversations(source, "conversations.jsonl", tokenizer, context, recipe.seed)
    left_out = conversations.too_long + conversations.untrained
    if left_out:
        reporter.line(
            f"{left_out} conversations are left out: {conversations.too_long} are longer than {context} tokens (the longest "
            f"has {conversations.longest}), {conversations.untrained} have no assistant turn."
        )
    documents = None
    if recipe.document_share:
        tokens = tokenize(
            TokensRecipe(name=f"{recipe.name}-tokens", documents=recipe.documents, tokenizer=recipe.checkpoint),
            workspace,
            reporter,
        )
        documents = DocumentRows(open_shard(tokens, "train"), context, seed=recipe.seed, document_mask=True)
    rows = max(1, recipe.batch_tokens // context)
    micro_rows = _micro_rows(recipe.micro_rows, rows, context)
    batches = Batches(
        conversations, rows=rows, micro_rows=micro_rows, documents=documents, document_share=recipe.document_share
    )
    everything = None
    if source.has("conversations_validation.jsonl"):
        held_out = _conversations(source, "conversations_validation.jsonl", tokenizer, context, recipe.seed)
        everything = lambda: validation_conversations(held_out, rows=micro_rows)
    shown = show_mask(tokenizer, conversations)
    reporter.line(f"What is trained in the first conversation, between [ ]:\n{shown}")
    return _run("chat", recipe, workspace, reporter, inputs, tokenizer, model, batches, everything, sample, mask=shown)


def _run(
    objective: str,
    recipe: PretrainRecipe | FinetuneRecipe,
    workspace: Workspace,
    reporter: Reporter,
    inputs: Mapping[str, Artifact],
    tokenizer: Tokenizer,
    model: Any,
    batches: Batches | Made[Micro],
    everything: Callable[[], Iterable[Micro]] | None,
    sample: Sample | None,
    *,
    held_out: Shard | None = None,
    mask: str | None = None,
    learn: Objective | None = None,
    judge: Objective | None = None,
) -> Artifact:
    """Train, judge on all that was held out, and write the artifact. `learn` is the objective where it needs more than its name,
    and `judge` the one that scores what was held out, if another."""
    learn = learn or OBJECTIVES[objective]
    judge = judge or learn
    context = recipe.context or model.config.max_tokens
    device.threads()
    target = device.torch_device()
    model.to(target)
    made_from = fingerprint("checkpoint", inputs, recipe, recipe.seed)
    folder = workspace.runs / f"{recipe.name}-{made_from[:12]}"
    if mask is not None:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "mask.txt", mask + "\n")
    some = None
    if everything is not None:
        count = max(1, VALIDATION_TOKENS // (batches.micro_rows * context))
        some = lambda: islice(everything(), count)
    settings = Settings(
        steps=recipe.steps,
        optimizer=recipe.optimizer,
        schedule=recipe.schedule,
        dtype=device.compute_dtype(target) if recipe.precision == "auto" else DTYPES[recipe.precision],
        validate_every=recipe.validate_every,
        checkpoint_every=recipe.checkpoint_every,
    )
    work = Work(
        name=recipe.name,
        folder=folder,
        batches=batches,
        objective=learn,
        validation=some,
        judge=judge,
        sample=None if sample is None else lambda model: sample(model, tokenizer),
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    reporter.line(
        f"{recipe.name}: {quantity(parameters)} parameters, {recipe.steps} steps of {batches.num_rows} x {context} tokens, "
        f"{recipe.steps / batches.steps_per_epoch:.1f} epochs, {str(settings.dtype).removeprefix('torch.')} on {target}"
    )
    outcome = train(model, work, settings, reporter)
    ended = time.perf_counter()
    facts = {
        "objective": objective,
        "parameters": parameters,
        "precision": str(settings.dtype).removeprefix("torch."),
        "epochs": recipe.steps / batches.steps_per_epoch,
        "steps": outcome.steps,
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "loss": outcome.loss,
        "validation_loss": outcome.validation_loss,
        "peak_memory_bytes": device.peak_memory_bytes(),
    }
    if everything is not None:
        loss = facts["validation_loss"] = validate(model.eval(), judge, everything())
        if held_out is not None:
            # Every token is a target once, so the sum of losses is the information in the whole text.
            trained = sum(batch.num_trained for batch in everything())
            facts["bits_per_byte"] = loss * trained / math.log(2) / held_out.bytes
    return_freed_memory()
    facts["stage_seconds"] = outcome.seconds + time.perf_counter() - ended  # with the last validation
    with workspace.create("checkpoint", recipe.name, inputs=inputs, recipe=recipe, seed=recipe.seed) as draft:
        save_model(
            model.eval(),
            draft.path,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=sorted(tokenizer.stop_ids),
            pad_token_id=tokenizer.pad_id,
        )
        tokenizer.save(draft.path)
        (draft.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in outcome.rows))
        if mask is not None:
            (draft.path / "mask.txt").write_text(mask + "\n", encoding="utf-8")
        draft.facts |= facts
    shutil.rmtree(folder, ignore_errors=True)
    said = f", held-out loss {facts['validation_loss']:.3f}" if everything is not None else ""
    said += f", {facts['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in facts else ""
    reporter.line(
        f"{draft.done.ref}: {quantity(outcome.tokens)} tokens in {duration(outcome.seconds)}, loss {outcome.loss:.3f}{said}"
    )
    reporter.event("checkpoint", ref=draft.done.ref, **facts)
    return draft.done


def show_mask(tokenizer: Tokenizer, conversations: ConversationRows) -> str:
    """The first packed row's first conversation as text, with what is trained between [ and ]."""
    rows = conversations.packed(torch.zeros(1, dtype=torch.int64).numpy())
    first = rows.documents[0] == 0
    tokens, targets = rows.tokens[0][first], rows.targets[0][first]
    pieces = [tokenizer.decode([int(tokens[0])], special=True)]
    open_ = False
    for at, target in enumerate(targets.tolist()):
        trained = target != UNTRAINED
        id = target if trained else int(tokens[at + 1]) if at + 1 < len(tokens) else None
        if trained != open_:
            pieces.append("[" if trained else "]")
            open_ = trained
        if id is not None:
            pieces.append(tokenizer.decode([id], special=True))
    return "".join(pieces) + ("]" if open_ else "")


def _conversations(source: Artifact, file: str, tokenizer: Tokenizer, context: int, seed: int) -> ConversationRows:
    if not source.has(file):
        raise UserError(
            "these documents have no conversations to learn from.",
            where=source.ref,
            cure="Add jsonl files with `messages`, or finetune on other documents.",
        )
    return ConversationRows(read_jsonl(source.file(file), Conversation), tokenizer, context, seed=seed)


def _micro_rows(asked: int | None, rows: int, context: int) -> int:
    return min(rows, asked or max(1, MICRO_TOKENS // context))


def _check_sizes(recipe: PretrainRecipe | FinetuneRecipe) -> None:
    counts: dict[str, Any] = {
        "context": recipe.context, "batch_tokens": recipe.batch_tokens, "micro_rows": recipe.micro_rows, "steps": recipe.steps,
        "validate_every": recipe.validate_every, "checkpoint_every": recipe.checkpoint_every,
    }  # fmt: skip
    if wrong := [name for name, value in counts.items() if value is not None and value < 1]:
        raise ValueError(f"{', '.join(wrong)} must be at least 1")
