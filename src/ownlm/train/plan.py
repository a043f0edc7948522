"""What a run will cost and which model fits, before it starts.

    budget ─► candidate widths ─► time of a step of each, from two short measurements ─► the width with the lowest
    expected loss ─► a few real steps of that one ─► steps, time, memory, disk ─► corrected by earlier runs here

The expected loss is the parametric law of Hoffmann et al. 2022 (arXiv:2203.15556, approach 3), with repeated tokens worth
what Muennighoff et al. 2023 found (arXiv:2305.16264, equation 5) and at most about four epochs. It is used to rank shapes
only: on a small machine a step has a fixed cost, so the best model is larger than 20 tokens per parameter suggests.
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ownlm import device
from ownlm.artifact import Workspace
from ownlm.errors import UserError
from ownlm.models.decoder import Decoder, DecoderConfig, count_parameters
from ownlm.report import Reporter, duration, quantity, size
from ownlm.storage import storage
from ownlm.tokens.batches import Batch
from ownlm.train.fresh import init_weights
from ownlm.train.loop import keep_freed_memory
from ownlm.train.objectives import causal_lm
from ownlm.train.optimizers import Optimizer, Update
from ownlm.train.parameters import Parameters
from ownlm.train.stages import MICRO_TOKENS, VALIDATION_TOKENS, ModelShape, PretrainRecipe

RECORD = "plans.jsonl"
WIDTHS = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1280, 1536, 2048)
MAX_EPOCHS = 4.0
TOKENS_PER_PARAMETER = 20.0  # the compute-optimal ratio of arXiv:2203.15556, for a budget of parameters only
HEAD_WORTH = 0.25  # of a weight of the layers, where a small model is mostly vocabulary (docs/LOG.md, 2026-11-25)
PROBE_S = 2.5
VALIDATIONS, STATES = 8, 6  # during one run
START_S = 2.0  # opening, verifying and writing artifacts
DISK_BYTES_PER_S = 100e6  # of a state: written, flushed and hashed


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """What there is to learn from, in tokens of the tokenizer that will be used."""

    train_tokens: int
    validation_tokens: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Measured on this machine: seconds of one step, seconds per token of a validation during training (in its dtype) and
    after it (in fp32, as the model is saved), and the peak memory of the process."""

    step_s: float
    validation_token_s: float
    final_token_s: float
    peak_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run, as predicted. `seconds` holds each stage in order, those that are over as they were; `raw_s` and `raw_bytes` are
    the predictions for training and memory before the correction by earlier runs."""

    shape: ModelShape
    context: int
    batch_tokens: int
    steps: int
    parameters: int
    tokens: int
    epochs: float
    tokens_per_s: float
    seconds: dict[str, float]
    peak_memory_bytes: int
    disk_bytes: int
    raw_s: float
    raw_bytes: int

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def rows(self) -> Iterator[tuple[str, str]]:
        """What a table of the plan shows."""
        shape = self.shape
        yield (
            "model",
            f"{quantity(self.parameters)} parameters: {shape.num_layers} layers of {shape.hidden_size}, context {self.context}",
        )
        yield (
            "training",
            f"{quantity(self.tokens)} tokens ({self.epochs:.1f} epochs), {self.steps} steps of {self.batch_tokens}",
        )
        yield "speed", f"{quantity(self.tokens_per_s)} tokens/s, measured here"
        for stage, seconds in self.seconds.items():
            yield f"time of {stage}", duration(seconds)
        yield "time in all", duration(self.total_s)
        yield "peak memory", size(self.peak_memory_bytes)
        yield "disk", size(self.disk_bytes)

    def recipe(self, name: str, *, documents: str, tokenizer: str, seed: int = 0) -> PretrainRecipe:
        """The pretraining that the plan describes."""
        return PretrainRecipe(
            name=name,
            documents=documents,
            tokenizer=tokenizer,
            model=self.shape,
            context=self.context,
            batch_tokens=self.batch_tokens,
            steps=self.steps,
            optimizer=optimizer_for(self.shape),
            validate_every=max(1, self.steps // VALIDATIONS),
            checkpoint_every=max(1, self.steps // STATES),
            seed=seed,
        )


def make_plan(
    corpus: Corpus,
    *,
    workspace: Workspace,
    reporter: Reporter,
    seconds: float | None = None,
    params: int | None = None,
    spent: Mapping[str, float] | None = None,
    reserved: Mapping[str, float] | None = None,
    reserved_bytes: int = 0,
) -> Plan:
    """The plan for a budget of `seconds` for everything, of `params`, or both.

    `spent` are the seconds of the stages that are over, `reserved` those that will follow training, which add
    `reserved_bytes` to the memory the process has now. Measures this machine for about ten seconds. Raises UserError when
    the time or the corpus is too small for any training.
    """
    assert seconds is not None or params is not None, "a budget is needed"
    before = {**(spent or {})}
    after = {**(reserved or {})}
    context = context_for(corpus)
    began = time.perf_counter()
    after_bytes = device.memory_bytes() + reserved_bytes
    time_ratio, memory_ratio = corrections(workspace)
    widths = WIDTHS if params is None else (width_for(params, corpus, context),)
    if len(widths) > 1:
        reporter.status("plan: measuring this machine")
        small, large = (probe(shape_of(width), corpus, context, 2_048) for width in (96, 256))
        cost = StepCost({96: small, 256: large}, corpus, context)
        left = _left(seconds, before, after, 4 * PROBE_S) / time_ratio
        width = min(WIDTHS, key=lambda width: expected_loss(width, cost(width), left, corpus, context))
    else:
        width = widths[0]
    shape = shape_of(width)
    parameters = count_parameters(shape.config(corpus.vocab_size, context))
    most_tokens = min(
        MAX_EPOCHS * corpus.train_tokens, TOKENS_PER_PARAMETER * parameters if seconds is None else math.inf
    )
    batch_tokens = 2_048
    reporter.status(f"plan: measuring {quantity(parameters)} parameters")
    measured = probe(shape, corpus, context, batch_tokens)
    if seconds is not None:
        # A larger step is better for a longer run, and cheaper per token.
        wanted = batch_for(
            min(most_tokens, batch_tokens * _left(seconds, before, after, 4 * PROBE_S) / measured.step_s), context
        )
    else:
        wanted = batch_for(most_tokens, context)
    if wanted != batch_tokens:
        batch_tokens = wanted
        measured = probe(shape, corpus, context, batch_tokens)
    before["planning"] = time.perf_counter() - began
    fixed_s = validation_s(measured, corpus, parameters)
    steps = most_tokens / batch_tokens
    if seconds is not None:
        steps = min(steps, (_left(seconds, before, after, 0.0) / time_ratio - fixed_s) / measured.step_s)
    if steps < 10:
        raise UserError(
            f"there is time or text for {max(0, int(steps))} training steps only.",
            cure="Give a larger budget (--budget 10m), or more documents.",
        )
    steps = int(steps)
    raw_s = steps * measured.step_s + fixed_s
    # The shard is mapped: its pages count as memory of the process once they were read.
    token_bytes = corpus.train_tokens * (2 if corpus.vocab_size <= 2**16 else 4)
    raw_bytes = max(measured.peak_memory_bytes + token_bytes, after_bytes + token_bytes + 4 * parameters)
    return Plan(
        shape=shape,
        context=context,
        batch_tokens=batch_tokens,
        steps=steps,
        parameters=parameters,
        tokens=steps * batch_tokens,
        epochs=steps * batch_tokens / corpus.train_tokens,
        tokens_per_s=batch_tokens / measured.step_s,
        seconds={**before, "training": raw_s * time_ratio, **after},
        peak_memory_bytes=int(raw_bytes * memory_ratio),
        disk_bytes=4 * parameters + 3 * 12 * parameters + token_bytes,
        raw_s=raw_s,
        raw_bytes=raw_bytes,
    )


def shape_of(width: int) -> ModelShape:
    """The shape of the one-parameter family: a layer more for every 64 of width, as in 192 x 4 and 768 x 13."""
    head_dim = 32 if width < 256 else 64
    return ModelShape(
        hidden_size=width,
        num_layers=max(2, round(width / 64) + 1),
        num_heads=width // head_dim,
        num_kv_heads=width // head_dim,
        head_dim=head_dim,
        intermediate_size=max(64, round(width * 8 / 3 / 64) * 64),
    )


def width_for(params: int, corpus: Corpus, context: int) -> int:
    """The width whose model comes nearest to `params` parameters, by ratio."""

    def distance(width: int) -> float:
        return abs(math.log(count_parameters(shape_of(width).config(corpus.vocab_size, context)) / params))

    return min(WIDTHS, key=distance)


def context_for(corpus: Corpus) -> int:
    """256 tokens; less where a short corpus would give too few rows to shuffle."""
    context = 256
    while context > 32 and corpus.train_tokens < 64 * context:
        context //= 2
    return context


def batch_for(tokens: float, context: int) -> int:
    """Tokens of a step: 2,048 for a run of 2 M tokens, growing as its 0.4th power (between the 0.383 that nanochat measured
    and the 1/2 of square-root scaling), a power of two."""
    best: float = 2_048 * max(1.0, tokens / 2e6) ** 0.4
    return max(context, min(65_536, 1 << round(math.log2(best))))


def optimizer_for(shape: ModelShape) -> Optimizer:
    """The default rule; AdamW's rates fall with the root of the width, Muon's need not (its updates have unit size)."""
    base = Optimizer()
    scale = (shape.hidden_size / 192) ** -0.5
    return Optimizer(embedding_lr=base.embedding_lr * scale, head_lr=base.head_lr * scale, vector_lr=base.vector_lr)


def probe(shape: ModelShape, corpus: Corpus, context: int, batch_tokens: int) -> Probe:
    """Train on random tokens for some 2.5 s: the cost of a step does not depend on what the tokens say."""
    device.threads()
    keep_freed_memory()
    target = device.torch_device()
    dtype = device.compute_dtype(target)
    model = init_weights(Decoder(shape.config(corpus.vocab_size, context))).to(target)
    parameters = Parameters(model, dtype)
    update = Update(optimizer_for(shape), parameters, dtype)
    rows = max(1, batch_tokens // context)
    micro_rows = min(rows, max(1, MICRO_TOKENS // context))
    generator = torch.Generator().manual_seed(0)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - began < PROBE_S:
        start = time.perf_counter()
        for first in range(0, rows, micro_rows):
            count = min(micro_rows, rows - first)
            tokens = torch.randint(corpus.vocab_size, (count, context + 1), generator=generator).to(target)
            batch = Batch(
                tokens_BT=tokens[:, :-1].contiguous(),
                targets_BT=tokens[:, 1:].contiguous(),
                positions_BT=None,
                documents_BT=None,
                num_trained=count * context,
            )
            loss = causal_lm(model, batch)
            (loss.sum / (rows * context)).backward()  # type: ignore[no-untyped-call]
            parameters.collect()
        update.step(len(times), 0.01, parameters.norm())
        times.append(time.perf_counter() - start)
        if len(times) >= 4 and time.perf_counter() - began > 4 * PROBE_S:
            break
    validation_s = _forward_s(model, batch)
    parameters.release(model)
    final_s = _forward_s(model, batch)
    peak = device.peak_memory_bytes()
    del model, parameters, update, loss, batch
    gc.collect()
    return Probe(
        step_s=statistics.median(times[1:]),
        validation_token_s=validation_s / tokens[:, 1:].numel(),
        final_token_s=final_s / tokens[:, 1:].numel(),
        peak_memory_bytes=peak,
    )


def _forward_s(model: Decoder, batch: Batch) -> float:
    """Seconds of one validation of the batch, the median of three after one more."""
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            float(causal_lm(model, batch).sum)
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


class StepCost:
    """Seconds of a step at any width: a fixed cost per layer and a speed, from measurements at two widths."""

    def __init__(self, probes: Mapping[int, Probe], corpus: Corpus, context: int) -> None:
        self.corpus, self.context = corpus, context
        (first, a), (second, b) = sorted(probes.items())
        layers, work = self._size(first)
        more_layers, more_work = self._size(second)
        # a.step_s = layers * fixed + work * per_flop, and the same for b; neither may be negative.
        determinant = layers * more_work - more_layers * work
        per_flop = (layers * b.step_s - more_layers * a.step_s) / determinant
        self.per_flop = max(per_flop, 0.2 * b.step_s / more_work)
        self.fixed = max(0.0, (b.step_s - more_work * self.per_flop) / more_layers)

    def _size(self, width: int) -> tuple[int, float]:
        shape = shape_of(width)
        return shape.num_layers, 2_048 * flops_per_token(
            shape.config(self.corpus.vocab_size, self.context), self.context
        )

    def __call__(self, width: int) -> float:
        layers, work = self._size(width)
        return layers * self.fixed + work * self.per_flop


def expected_loss(width: int, step_s: float, seconds: float, corpus: Corpus, context: int) -> float:
    """Nats per token after `seconds` of 2,048-token steps; infinite where not even ten steps fit."""
    shape = shape_of(width)
    table = corpus.vocab_size * shape.hidden_size
    parameters = count_parameters(shape.config(corpus.vocab_size, context)) - 2 * table + HEAD_WORTH * table
    tokens = min(2_048 * seconds / step_s, MAX_EPOCHS * corpus.train_tokens)
    if seconds < 10 * step_s or parameters > 8 * corpus.train_tokens:
        return math.inf
    unique = min(tokens, corpus.train_tokens)
    repeats = tokens / unique - 1
    worth = unique + unique * 15.39 * (1 - math.exp(-repeats / 15.39))
    loss: float = 1.69 + 406.4 / parameters**0.34 + 410.7 / worth**0.28
    return loss


def validation_s(measured: Probe, corpus: Corpus, parameters: int) -> float:
    """Seconds of a run besides its steps: validations, states, start and end."""
    during = (VALIDATIONS + 1) * min(VALIDATION_TOKENS, corpus.validation_tokens) * measured.validation_token_s
    final = corpus.validation_tokens * measured.final_token_s
    return during + final + STATES * 12 * parameters / DISK_BYTES_PER_S + START_S


def corrections(workspace: Workspace) -> tuple[float, float]:
    """(time, memory): the median of actual / predicted over the last nine runs here, between a half and two; 1 at first."""
    rows = [json.loads(line) for line in _lines(workspace.root / RECORD)][-9:]
    if not rows:
        return 1.0, 1.0
    ratios = [
        statistics.median(row[actual] / row[raw] for row in rows)
        for actual, raw in (("actual_s", "raw_s"), ("actual_bytes", "raw_bytes"))
    ]
    return min(2.0, max(0.5, ratios[0])), min(2.0, max(0.5, ratios[1]))


def record(workspace: Workspace, plan: Plan, *, training_s: float, total_s: float, peak_memory_bytes: int) -> None:
    """Keep what a planned run really took, for the next prediction: `training_s` of the pretrain stage, `total_s` of all."""
    row = {
        **{key: value for key, value in asdict(plan).items() if key != "shape"},
        "width": plan.shape.hidden_size,
        "predicted_s": plan.total_s,
        "actual_s": training_s,
        "actual_total_s": total_s,
        "actual_bytes": peak_memory_bytes,
    }
    with storage(workspace.root):
        workspace.root.mkdir(parents=True, exist_ok=True)
        with (workspace.root / RECORD).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _left(seconds: float | None, before: Mapping[str, float], after: Mapping[str, float], more: float) -> float:
    assert seconds is not None
    return max(0.0, seconds - sum(before.values()) - sum(after.values()) - more)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def flops_per_token(config: DecoderConfig, context: int) -> float:
    """Floating-point operations of one trained token, forward and backward, at a context of `context` tokens.

    6 per weight in a matrix product, and for attention 6 H d context per layer: two products of 2 H d per visible key,
    three times (forward, both gradients), with half the context visible on average (arXiv:2204.02311 appendix B counts
    all of it as visible). Inference takes a third.
    """
    D, matrices, attention = config.hidden_size, config.hidden_size * config.vocab_size, 0
    for layer in config.layers:
        a, mlp = layer.attention, layer.mlp
        matrices += D * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
        used = 1 if mlp.experts is None else mlp.experts.per_token
        matrices += used * D * mlp.size * (3 if mlp.gated else 2)
        attention += a.num_heads * a.head_dim * min(context, 2 * (a.window or context))
    return 6.0 * matrices + 6.0 * attention
