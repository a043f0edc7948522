"""The two training stages: pretrain (documents -> base model) and finetune (base model + conversations -> chat model).

    documents ─┐         (teacher) ─┐
    tokenizer ─┴► tokens ───────────┴► pretrain ─► checkpoint ─┐
    conversations ─────────────────────────────────────────────┴► finetune ─► checkpoint, or adapter

A checkpoint is a Hugging Face directory (config.json, model.safetensors, tokenizer) with the training curve beside it.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from ownlm import device
from ownlm.adapters.lora import LoRA, add_lora, merge
from ownlm.adapters.peft import load_adapter, save_adapter
from ownlm.adapters.tuning import with_head_of
from ownlm.artifact import Artifact, Workspace, fingerprint
from ownlm.checkpoints.weights import load_model, save_model
from ownlm.errors import UserError
from ownlm.models.decoder import Decoder, DecoderConfig, uniform
from ownlm.models.specs import Attention, FeedForward, Rotary
from ownlm.quantization.codes import quantize_linears
from ownlm.report import Reporter, duration, quantity
from ownlm.storage import storage, write_atomic
from ownlm.tokens.batches import Batches, DocumentRows, Micro
from ownlm.tokens.codec import Tokenizer
from ownlm.tokens.examples import Made
from ownlm.tokens.gguf import tokenizer_of
from ownlm.tokens.shards import Shard, TokensRecipe, open_shard, tokenize
from ownlm.train.conversations import prepare_chat
from ownlm.train.loop import Settings, Work, return_freed_memory, train, validate
from ownlm.train.objectives import OBJECTIVES, Distillation, Objective
from ownlm.train.optimizers import Optimizer
from ownlm.train.pretraining import CausalLM, Learning, corruption_of, data, learning, new_model
from ownlm.train.schedule import Schedule
from ownlm.train.tasks import TaskName, prepare, prepare_text

Precision = Literal["auto", "bf16", "fp32"]
Kind = Literal["checkpoint", "adapter"]
Sample = Callable[[Decoder, Tokenizer], str]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VALIDATION_TOKENS = 32_768  # of one validation during training; the last one reads every held-out document
TUNING = Optimizer(lr=0.01, embedding_lr=0.005, head_lr=0.0025, vector_lr=0.005)
# AdamW: Muon would step equally far along all r directions of a pair, learned or not. Found on models of 64 to 200 hidden
# units, where anything from 0.005 to 0.02 does; a billion parameters want about 2e-4. Decay would pull B A, not the weight.
LORA_TUNING = Optimizer(
    kind="adamw",
    lr=0.01,
    embedding_lr=0.005,
    head_lr=0.005,
    vector_lr=0.005,
    betas=(0.9, 0.99),
    eps=1e-8,
    weight_decay=0.0,
)
TASK_TUNING = Optimizer(
    kind="adamw",
    lr=2e-4,
    embedding_lr=2e-4,
    head_lr=2e-4,
    vector_lr=2e-4,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.01,
)
TASK_LORA_TUNING = replace(LORA_TUNING, lr=2e-3, embedding_lr=2e-3, head_lr=2e-3, vector_lr=2e-3)
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
    """A checkpoint tuned for a task, by default to chat, on a documents artifact.

    task    chat: its conversations; of them only the assistant's words are learned. text: its documents, read on as in pretraining.
            classification, tokens, answer, seq2seq: its labelled examples (train/tasks.py)
    prefix  before each source of seq2seq, e.g. "summarize: " (T5)

    `document_share` of the rows of chat are documents again, so that what was read is not forgotten. `context` None: the
    checkpoint's.

    With a `lora` table only an adapter is trained and kept, over a base in `base_precision`; `merge` makes a whole
    checkpoint of it. A base that never saw a chat must learn the tokens of its turns: train_also = ["lm_head"].
    `optimizer` None: Muon for the whole model (lr 0.01), AdamW for an adapter (lr 0.01; larger models want less, 2e-4 at
    a billion parameters) and for tasks (lr 2e-4; 2e-3 for an adapter).
    """

    name: str
    checkpoint: str
    documents: str
    task: TaskName = "chat"
    prefix: str = ""
    lora: LoRA | None = None
    base_precision: Literal["int8", "nf4"] | None = None
    merge: bool = False
    document_share: float = 0.0
    context: int | None = None
    batch_tokens: int = 2_048
    micro_rows: int | None = None
    steps: int = 300
    optimizer: Optimizer | None = None
    schedule: Schedule = field(default_factory=Schedule)
    precision: Precision = "auto"
    validate_every: int | None = 100
    checkpoint_every: int | None = 100
    seed: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self)
        if not 0 <= self.document_share < 1:
            raise ValueError("document_share is at least 0 and less than 1")
        if self.lora is None and (self.base_precision is not None or self.merge):
            raise ValueError("base_precision and merge belong to a lora table")
        if self.document_share and self.task != "chat":
            raise ValueError(f"document_share is for chat, not for {self.task}")
        if self.prefix and self.task != "seq2seq":
            raise ValueError(f"prefix is for seq2seq, not for {self.task}")
        if self.lora is not None and self.optimizer is not None and self.optimizer.kind == "muon":
            raise ValueError('the thin matrices of lora learn with optimizer.kind = "adamw"')


def pretrain(
    recipe: PretrainRecipe, workspace: Workspace, reporter: Reporter, *, sample: Sample | None = None
) -> Artifact:
    """A checkpoint artifact: a base model trained on the documents. Continues a run that was stopped.

    `sample(model, tokenizer)` says something with the model as it is; it is shown now and then.
    """
    source = workspace.open(recipe.tokenizer, ("tokenizer", "checkpoint"))
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
    tokenizer = tokenizer_of(source.path)
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
    run = _Run(
        kind="checkpoint",
        objective=recipe.objective.kind,
        parameters=_parameters(model),
        learn=learn,
        judge=judge,
        recipe=recipe,
        optimizer=recipe.optimizer,
        inputs=inputs,
        tokenizer=tokenizer,
        context=recipe.context,
        batches=prepared.batches,
        everything=prepared.everything,
        sample=sample if isinstance(model, Decoder) else None,
        held_out=prepared.held_out,
    )
    return _train(run, model, workspace, reporter)


def finetune(
    recipe: FinetuneRecipe, workspace: Workspace, reporter: Reporter, *, sample: Sample | None = None
) -> Artifact:
    """The checkpoint tuned for the recipe's task: a checkpoint artifact, or with `lora` an adapter.

    Before the first step of chat the first conversation is shown with what is trained in it, and kept as mask.txt.
    """
    base = workspace.open(recipe.checkpoint, "checkpoint")
    source = workspace.open(recipe.documents, "documents")
    inputs = {"checkpoint": base, "documents": source}
    kind: Kind = "checkpoint" if recipe.lora is None or recipe.merge else "adapter"
    if ready := workspace.find(recipe.name, kind=kind, inputs=inputs, recipe=recipe, seed=recipe.seed):
        return ready
    tokenizer = tokenizer_of(base.path)
    model = load_model(base.path, dtype=torch.float32)
    context = recipe.context or model.config.max_tokens
    if context > model.config.max_tokens:
        raise UserError(
            f"the context of {context} tokens is longer than the checkpoint's {model.config.max_tokens}.",
            where=recipe.name,
            cure=f"Set context to at most {model.config.max_tokens}.",
        )
    rows = max(1, recipe.batch_tokens // context)
    micro_rows = _micro_rows(recipe.micro_rows, rows, context)
    shown = None
    if recipe.task == "chat":
        documents = None
        if recipe.document_share:
            shard = open_shard(_tokens(recipe, workspace, reporter), "train")
            documents = DocumentRows(shard, context, seed=recipe.seed, document_mask=True)
        found, shown = prepare_chat(
            model, source, tokenizer, documents, reporter, context=context, rows=rows, micro_rows=micro_rows,
            document_share=recipe.document_share, seed=recipe.seed,
        )  # fmt: skip
    elif recipe.task == "text":
        tokens = _tokens(recipe, workspace, reporter)
        found = prepare_text(
            model, tokens, tokenizer, context=context, rows=rows, micro_rows=micro_rows, seed=recipe.seed
        )
    else:
        found = prepare(
            recipe.task, model, source, tokenizer, reporter,
            context=context, rows=rows, micro_rows=micro_rows, prefix=recipe.prefix, seed=recipe.seed,
        )  # fmt: skip
    model, lora = found.model, recipe.lora
    if lora is not None and found.fresh_head:
        lora = replace(lora, train_also=(*lora.train_also, *_head_layers(model)))
    parameters = _parameters(model)  # before they become integers
    if recipe.base_precision is not None:
        quantize_linears(model, recipe.base_precision)
    if lora is not None:
        add_lora(model, lora, seed=recipe.seed)
    run = _Run(
        kind=kind,
        objective=found.objective,
        parameters=parameters,
        learn=OBJECTIVES[found.objective],
        judge=OBJECTIVES[found.objective],
        recipe=recipe,
        optimizer=recipe.optimizer or _tuning(recipe),
        inputs=inputs,
        tokenizer=tokenizer,
        context=context,
        batches=found.batches,
        everything=found.everything,
        sample=sample if found.objective in ("chat", "causal_lm") and recipe.task != "seq2seq" else None,
        held_out=found.held_out,
        mask=shown,
    )
    return _train(run, model, workspace, reporter)


def _tuning(recipe: FinetuneRecipe) -> Optimizer:
    if recipe.task == "chat":
        return TUNING if recipe.lora is None else LORA_TUNING
    return TASK_TUNING if recipe.lora is None else TASK_LORA_TUNING


def _head_layers(model: Any) -> list[str]:
    """The linear layers that a fresh head brought, to be trained whole."""
    return [
        name
        for name, module in model.named_modules()
        if name.startswith("head.") and isinstance(module, torch.nn.Linear)
    ] + (["pooler.dense"] if getattr(model, "pooler", None) is not None else [])


def _tokens(recipe: FinetuneRecipe, workspace: Workspace, reporter: Reporter) -> Artifact:
    """The documents in the checkpoint's own tokens."""
    shards = TokensRecipe(name=f"{recipe.name}-tokens", documents=recipe.documents, tokenizer=recipe.checkpoint)
    return tokenize(shards, workspace, reporter)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What the two stages hand to the one that trains. `learn` is minimised, `judge` scores what was held out; `everything`
    yields all of that, `held_out` its bytes; `mask` is the text of mask.txt."""

    kind: Kind
    objective: str
    parameters: int
    learn: Objective
    judge: Objective
    recipe: PretrainRecipe | FinetuneRecipe
    optimizer: Optimizer
    inputs: Mapping[str, Artifact]
    tokenizer: Tokenizer
    context: int
    batches: Batches | Made[Micro]
    everything: Callable[[], Iterable[Micro]] | None
    sample: Sample | None
    held_out: Shard | None = None
    mask: str | None = None


def _train(run: _Run, model: Any, workspace: Workspace, reporter: Reporter) -> Artifact:
    """Train, judge on all that was held out, and write the artifact."""
    recipe, batches, everything, sample = run.recipe, run.batches, run.everything, run.sample
    device.threads()
    target = device.torch_device()
    model.to(target)
    made_from = fingerprint(run.kind, run.inputs, recipe, recipe.seed)
    folder = workspace.runs / f"{recipe.name}-{made_from[:12]}"
    if run.mask is not None:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "mask.txt", run.mask + "\n")
    some = None
    if everything is not None:
        count = max(1, VALIDATION_TOKENS // (batches.micro_rows * run.context))
        some = lambda: islice(everything(), count)
    settings = Settings(
        steps=recipe.steps,
        optimizer=run.optimizer,
        schedule=recipe.schedule,
        dtype=device.compute_dtype(target) if recipe.precision == "auto" else DTYPES[recipe.precision],
        validate_every=recipe.validate_every,
        checkpoint_every=recipe.checkpoint_every,
    )
    work = Work(
        name=recipe.name,
        folder=folder,
        batches=batches,
        objective=run.learn,
        validation=some,
        judge=run.judge,
        sample=None if sample is None else lambda model: sample(model, run.tokenizer),
    )
    parameters = run.parameters
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    of_them = "" if trained == parameters else f"{quantity(trained)} trained of "
    reporter.line(
        f"{recipe.name}: {of_them}{quantity(parameters)} parameters, {recipe.steps} steps of {batches.num_rows} x {run.context} tokens, "
        f"{recipe.steps / batches.steps_per_epoch:.1f} epochs, {str(settings.dtype).removeprefix('torch.')} on {target}"
    )
    outcome = train(model, work, settings, reporter)
    ended = time.perf_counter()
    facts = {
        "objective": run.objective,
        "parameters": parameters,
        "trained_parameters": trained,
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
        loss = facts["validation_loss"] = validate(model.eval(), run.judge, everything())
        if run.held_out is not None:
            # Every token is a target once, so the sum of losses is the information in the whole text.
            targets = sum(batch.num_trained for batch in everything())
            facts["bits_per_byte"] = loss * targets / math.log(2) / run.held_out.bytes
    return_freed_memory()
    facts["stage_seconds"] = outcome.seconds + time.perf_counter() - ended  # with the last validation
    with workspace.create(run.kind, recipe.name, inputs=run.inputs, recipe=recipe, seed=recipe.seed) as draft:
        if run.kind == "adapter":
            save_adapter(model, draft.path, base=run.inputs["checkpoint"].ref)
        else:
            _save_checkpoint(run, model, folder, draft.path)
        (draft.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in outcome.rows))
        if run.mask is not None:
            (draft.path / "mask.txt").write_text(run.mask + "\n", encoding="utf-8")
        draft.facts |= facts
    shutil.rmtree(folder, ignore_errors=True)
    said = f", held-out loss {facts['validation_loss']:.3f}" if everything is not None else ""
    said += f", {facts['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in facts else ""
    reporter.line(
        f"{draft.done.ref}: {quantity(outcome.tokens)} tokens in {duration(outcome.seconds)}, loss {outcome.loss:.3f}{said}"
    )
    reporter.event(run.kind, ref=draft.done.ref, **facts)
    return draft.done


def _save_checkpoint(run: _Run, model: Any, runs: Path, folder: Path) -> None:
    """Write the whole model. An adapter goes into a fresh copy of its base: the one in memory may be rounded or quantised."""
    if isinstance(run.recipe, FinetuneRecipe) and run.recipe.lora is not None:
        save_adapter(model, runs / "adapter")
        model = with_head_of(load_model(run.inputs["checkpoint"].path, dtype=torch.float32), runs / "adapter")
        load_adapter(model, runs / "adapter")
        merge(model)
    save_model(
        model.eval(),
        folder,
        bos_token_id=run.tokenizer.bos_id,
        eos_token_id=sorted(run.tokenizer.stop_ids),
        pad_token_id=run.tokenizer.pad_id,
    )
    run.tokenizer.save(folder)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _micro_rows(asked: int | None, rows: int, context: int) -> int:
    return min(rows, asked or max(1, MICRO_TOKENS // context))


def _check_sizes(recipe: PretrainRecipe | FinetuneRecipe) -> None:
    counts: dict[str, Any] = {
        "context": recipe.context, "batch_tokens": recipe.batch_tokens, "micro_rows": recipe.micro_rows, "steps": recipe.steps,
        "validate_every": recipe.validate_every, "checkpoint_every": recipe.checkpoint_every,
    }  # fmt: skip
    if wrong := [name for name, value in counts.items() if value is not None and value < 1]:
        raise ValueError(f"{', '.join(wrong)} must be at least 1")
