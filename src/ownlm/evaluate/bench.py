"""How fast a model generates on this machine, beside what the machine can do at most.

model ─► its bare step, and the engine over it ─► tokens/s of prompts, of 1, 4, 16 … streams ─┬─► a table, bench.json
machine ─► reading memory, products of matrices (kernels/limits.py) ──────────────────────────┴─► bench.html with a roofline
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from ownlm import device
from ownlm.artifact import Workspace
from ownlm.errors import UserError
from ownlm.evaluate.page import Block, Figure, Heading, Table, Text, html
from ownlm.evaluate.plots import Measure, roofline
from ownlm.generate.measure import STEPS, Measured, NativeStep, TorchStep, Whole, Work, work
from ownlm.generate.model import Model
from ownlm.generate.opening import load_decoder
from ownlm.generate.runners import NativeRunner, Runner
from ownlm.kernels import library
from ownlm.kernels.limits import Limits, limits
from ownlm.kernels.native import PAGE, NativeDecoder, unsupported
from ownlm.kernels.sources import Kind, default_kind
from ownlm.models.decoder import Decoder
from ownlm.quantization.codes import QuantizedLinear
from ownlm.report import Reporter

Side = Literal["step", "engine"]
PROMPTS, BATCHES = (64, 512), (1, 2, 4, 8, 16)
CONTEXT = 64  # tokens that a stream holds when it begins to write
PAGES = 8  # of the cache for each stream, at least
PRODUCT: dict[Kind, str] = {
    "f32": "f32",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int8",
    "uint4": "int8",
    "fp8": "bf16",
}  # what weights are multiplied as


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Tokens a second, the median of the rounds with the smallest and the largest. `share` is how much that is of what memory and
    products allow for such a step, whichever is less; `intensity` is in operations for each byte."""

    what: Literal["prompt", "streams"]
    count: int
    side: Side
    median: float
    smallest: float
    largest: float
    intensity: float
    operations_a_second: float
    share: float

    @property
    def label(self) -> str:
        if self.what == "prompt":
            return f"prompt of {self.count:,} tokens"
        return f"{self.count} stream{'s' * (self.count > 1)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What was measured. `runs_on` names the kernels, or PyTorch and why."""

    model: str
    parameters: int
    kind: Kind
    runs_on: str
    context: int
    rounds: int
    limits: Limits
    rows: tuple[Row, ...]


def bench(
    ref: str | Path,
    *,
    kind: Kind | None = None,
    threads: int | None = None,
    prompts: Sequence[int] | None = None,
    batches: Sequence[int] = BATCHES,
    rounds: int = 3,
    workspace: Workspace,
    reporter: Reporter,
) -> Bench:
    """The measurements of a decoder on the CPU, all in turn, `rounds` times over.

    kind     the weights' precision; None: as the model would run
    prompts  lengths, by default PROMPTS as far as the model's context goes
    batches  numbers of streams that write together
    Raises UserError for what doesn't fit the model, and where `load_decoder` does.
    """
    if kind is not None and kind not in get_args(Kind):
        raise UserError(f"{kind!r} is no precision.", where="--kind", cure=f"One of {', '.join(get_args(Kind))}.")
    if threads is not None and not 1 <= threads <= 4 * device.cores():
        raise UserError(f"{threads} is out of range.", where="--threads", cure=f"There are {device.cores()} cores.")
    used = device.threads(threads)
    model = load_decoder(ref, workspace=workspace, device="cpu")
    context = min(CONTEXT, model.context // 2)
    lengths = _lengths(prompts, model.context - 1)
    streams = _counts(batches, "--batches")
    runner = _runner(model, kind, max(streams))
    native = runner.native if isinstance(runner, NativeRunner) else None
    decoder = model.writer() if native else cast(Decoder, model.decoder)
    kind = native.kind if native else default_kind(decoder)
    shape = {"longest": max(lengths), "streams": max(streams), "context": context}
    step: Measured = NativeStep(native, **shape) if native else TorchStep(decoder, **shape)
    sides: dict[Side, Measured] = {"step": step, "engine": Whole(decoder, model.tokenizer, runner, context=context)}
    asked = [("prompt", length) for length in lengths] + [("streams", count) for count in streams]
    found: dict[tuple[str, int, Side], list[float]] = {}
    roofs = limits(used)
    with torch.inference_mode():
        for turn in range(rounds):
            roofs = roofs.best(limits(used))
            for side in sides.values():  # nobody's first time counts, nor that after the memory was read
                side.prompt(lengths[0])
            for what, count in asked:
                for name, side in sides.items():
                    reporter.status(f"round {turn + 1} of {rounds}: {what} {count}, {name}")
                    speed = side.prompt(count) if what == "prompt" else side.streams(count)
                    found.setdefault((what, count, name), []).append(speed)
    todo = work(decoder, kind)
    return Bench(
        model=model.ref,
        parameters=model.num_parameters,
        kind=kind,
        runs_on=f"the {native.instruction_set} kernels" if native else f"PyTorch ({unsupported(decoder)})",
        context=context,
        rounds=rounds,
        limits=roofs,
        rows=tuple(_row(*key, speeds, todo, context, roofs, PRODUCT[kind]) for key, speeds in found.items()),
    )


def _runner(model: Model, kind: Kind | None, streams: int) -> Runner:
    """What the model runs on, in that precision. UserError for one that can't be had."""
    decoder = model.writer()
    kept = any(isinstance(module, QuantizedLinear) for module in decoder.modules())
    if kind is None or kind == default_kind(decoder):
        return model.engine(streams).runner
    if kept:
        raise UserError(
            f"this model is kept in {default_kind(decoder)}.",
            where="--kind",
            cure="Leave it out, or name the original.",
        )
    why = unsupported(decoder)
    if why is not None:
        raise UserError(f"the kernels are needed for {kind}, and don't run here: {why}.", where="--kind")
    whole = cast(Decoder, model.decoder)
    native = NativeDecoder(whole, kind)
    return NativeRunner(native, whole, pages=max(-(-model.context // PAGE), streams * PAGES))


def _lengths(prompts: Sequence[int] | None, most: int) -> list[int]:
    if prompts is None:
        return sorted({min(length, most) for length in PROMPTS})
    lengths = _counts(prompts, "--prompts")
    if lengths[-1] > most:
        raise UserError(
            f"a prompt of {lengths[-1]} tokens doesn't fit.",
            where="--prompts",
            cure=f"This model takes {most} at most.",
        )
    return lengths


def _counts(values: Sequence[int], where: str) -> list[int]:
    wrong = next((value for value in values if not 1 <= value <= 100_000), None)
    if wrong is not None or not values:
        raise UserError(
            f"{wrong} is out of range." if values else "there is no number.", where=where, cure="E.g. 1,4,16."
        )
    return sorted(set(values))


def _row(
    what: str, count: int, side: Side, speeds: Sequence[float], todo: Work, context: int, roofs: Limits, product: str
) -> Row:
    median = statistics.median(speeds)
    if what == "prompt":
        tokens, wanted, sequences, before = count, 1, 1, count // 2
    else:
        tokens, wanted, sequences, before = count, count, count, context + STEPS // 2
    operations, read = todo.operations(tokens, wanted, before), todo.bytes(tokens, sequences, before)
    fastest = max(read / roofs.memory, operations / roofs.products[product])  # seconds
    return Row(
        what="prompt" if what == "prompt" else "streams",
        count=count,
        side=side,
        median=median,
        smallest=min(speeds),
        largest=max(speeds),
        intensity=operations / read,
        operations_a_second=operations * median / tokens,
        share=fastest * median / tokens,
    )


# ---- telling


def table(done: Bench) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: tokens a second of the step and of the engine, and the share of the machine's limit."""
    headings = ["", "bare step, tokens/s", "engine, tokens/s", "the step's share of the limit", "of the engine"]
    rows = []
    for step in (row for row in done.rows if row.side == "step"):
        engine = next(
            row for row in done.rows if row.side == "engine" and (row.what, row.count) == (step.what, step.count)
        )
        speeds = [f"{row.median:,.0f} ({row.smallest:,.0f}-{row.largest:,.0f})" for row in (step, engine)]
        rows.append([step.label, *speeds, *(f"{row.share:.0%}" for row in (step, engine))])
    return headings, rows


def about(done: Bench) -> list[str]:
    """What the numbers are of, in sentences."""
    roofs = done.limits
    products = ", ".join(f"{kind} {speed / 1e9:,.0f}" for kind, speed in roofs.products.items())
    return [
        f"{done.model}: {done.parameters:,} parameters as {done.kind}, on {done.runs_on}, {roofs.threads} threads; "
        f"the median of {done.rounds} (smallest to largest). Streams hold {done.context} tokens when they begin.",
        f"Limits of this machine, the best of all rounds: memory {roofs.memory / 1e9:.1f} GB/s; products of matrices, "
        f"in billions of operations a second: {products}.",
    ]


def write(done: Bench, folder: Path) -> None:
    """bench.json, roofline.svg and bench.html, a page that needs nothing from anywhere. UserError where they can't be written."""
    points = [
        Measure(label=row.label, intensity=row.intensity, speed=row.operations_a_second, faint=row.side == "engine")
        for row in done.rows
    ]
    kind = PRODUCT[done.kind]
    svg = roofline(points, memory=done.limits.memory, products=done.limits.products[kind], kind=kind)
    headings, rows = table(done)
    caption = (
        "Each point is a measurement: what it multiplies for each byte of weights and cache it reads, and how much of it a second. "
        "Left of the roof's corner the memory is the limit, right of it the processor."
    )
    blocks: list[Block] = [Heading(f"Generation of {done.model}", 1), *(Text(text) for text in about(done))]
    blocks += [Table([headings[0], *(f">{heading}" for heading in headings[1:])], rows)]
    blocks += [Figure("roofline.svg", svg, caption)]
    machine = device.machine()
    blocks.append(Text(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        told = asdict(done) | {"machine": machine, "instruction_sets": library.instruction_sets()}
        (folder / "bench.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        (folder / "roofline.svg").write_text(svg, encoding="utf-8")
        (folder / "bench.html").write_text(html(f"Generation of {done.model}", blocks), encoding="utf-8")
    except OSError as fault:
        raise UserError(f"this can't be written: {fault.strerror}.", where=str(folder)) from None
