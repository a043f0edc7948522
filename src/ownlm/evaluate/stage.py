"""The stage: a checkpoint and documents in, scores with every answer and a report out."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ownlm import device
from ownlm.artifact import Artifact, Workspace
from ownlm.errors import ArtifactError, NotFound, UserError
from ownlm.evaluate import page, report
from ownlm.evaluate.harness import Result, Settings, measure
from ownlm.evaluate.plots import Curve
from ownlm.evaluate.tasks import make_tasks
from ownlm.generate.opening import load_writer
from ownlm.generate.seq2seq import Seq2Seq
from ownlm.lineage import lineage
from ownlm.recipe import validate
from ownlm.records import Score, from_json, to_json, write_jsonl
from ownlm.report import Reporter, duration
from ownlm.storage import sha256

TaskName = Literal["questions", "bits_per_byte", "canary", "association", "examples"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFile:
    """A file of questions. `sha256` pins its content: filled in by the stage, refused when it differs."""

    path: Path
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateRecipe:
    """How to evaluate.

    name          of the scores
    checkpoint    what to evaluate
    documents     its questions, held-out documents and planted truths are asked
    tasks         none named: every one that the documents have something for
    files         more tasks, from JSON lines (see evaluate/tasks/files.py)
    limit         items per task at most; none: all
    max_bytes     of held-out text for bits per byte
    max_tokens    of an answer
    batch_tokens  of one forward pass; the scores don't depend on it
    prefix        before each source of seq2seq; none given: the one the checkpoint was tuned with
    """

    name: str
    checkpoint: str
    documents: str
    tasks: tuple[TaskName, ...] | None = None
    files: tuple[TaskFile, ...] = ()
    limit: int | None = None
    max_bytes: int = 300_000
    max_tokens: int = 32
    batch_tokens: int = 8192
    prefix: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("limit", "max_bytes", "max_tokens", "batch_tokens"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"{key} must be at least 1")


def evaluate(recipe: EvaluateRecipe, workspace: Workspace, reporter: Reporter) -> Artifact:
    """The scores artifact: scores.json, answers.jsonl, report.md with its pictures, and report.html, which stands alone."""
    checkpoint = workspace.open(recipe.checkpoint, ("checkpoint", "adapter"))
    documents = workspace.open(recipe.documents, "documents")
    recipe = replace(recipe, files=tuple(map(pinned, recipe.files)))
    inputs = {"checkpoint": checkpoint, "documents": documents}
    ready = workspace.find(recipe.name, kind="scores", inputs=inputs, recipe=recipe, seed=recipe.seed)
    if ready is not None:
        reporter.line(f"{ready.ref} is already there.")
        return ready

    started = time.monotonic()
    tasks = make_tasks(documents, recipe.tasks, [file.path for file in recipe.files])
    if not tasks:
        raise UserError("there is nothing to evaluate on.", where=documents.ref, cure="Name `files` of questions.")
    model = load_writer(checkpoint.path, workspace=workspace)
    if isinstance(model, Seq2Seq) and set(tasks) != {"examples"}:
        raise UserError(
            f"an encoder-decoder can't be asked {', '.join(name for name in tasks if name != 'examples')}.",
            where=checkpoint.ref,
            cure="Name documents with examples of seq2seq.",
        )
    settings = Settings(
        limit=recipe.limit, max_bytes=recipe.max_bytes, max_tokens=recipe.max_tokens, batch_tokens=recipe.batch_tokens,
        prefix=str(checkpoint.manifest.recipe.get("prefix", "")) if recipe.prefix is None else recipe.prefix,
        seed=recipe.seed,
    )  # fmt: skip
    results = measure(model, tasks, settings, reporter)
    seconds, memory = time.monotonic() - started, device.peak_memory_bytes()
    subject = report.Subject(
        checkpoint=checkpoint,
        lineage=list(lineage(workspace, checkpoint)),
        curves=list(curves(checkpoint, workspace)),
        num_parameters=model.num_parameters,
        context=model.context,
        vocab_size=model.tokenizer.vocab_size,
        settings=settings,
        machine=device.machine(),
        seconds=seconds,
        peak_memory_bytes=memory,
    )
    with workspace.create("scores", recipe.name, inputs=inputs, recipe=recipe, seed=recipe.seed) as draft:
        write(draft.path, subject, results)
        draft.facts |= headline(results) | {"seconds": round(seconds, 2), "peak_memory_bytes": memory}
    tell(draft.done, results, seconds, reporter)
    return draft.done


def scores_of(
    ref: str,
    *,
    tasks: Sequence[str] | None = None,
    documents: str | None = None,
    workspace: Workspace | None = None,
    reporter: Reporter | None = None,
) -> list[Score]:
    """`evaluate` by reference; the documents are those the checkpoint was made from, unless others are named."""
    workspace = workspace or Workspace(device.home(), reporter)
    checkpoint = workspace.open(ref, ("checkpoint", "adapter"))
    sources = [one.ref for one in lineage(workspace, checkpoint) if one.kind == "documents" and one.state == "here"]
    if documents is None and not sources:
        raise UserError(f"the documents {checkpoint.ref} was made from are gone.", cure="Name others: documents=…")
    fields = {
        "name": f"{checkpoint.name}-scores",
        "checkpoint": ref,
        "documents": documents or sources[0],
        "tasks": tasks,
    }
    made = evaluate(validate(EvaluateRecipe, fields, where="evaluate"), workspace, reporter or Reporter.silent())
    return [from_json(Score, row) for row in json.loads(made.file("scores.json").read_text(encoding="utf-8"))]


def write(folder: Path, subject: report.Subject, results: list[Result]) -> None:
    """The files of the artifact."""
    scores = [to_json(score) for result in results for score in result.scores]
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    write_jsonl(folder / "answers.jsonl", (answer for result in results for answer in result.answers))
    blocks = report.compose(subject, results)
    (folder / "report.md").write_text(page.markdown(blocks), encoding="utf-8")
    title = f"{subject.checkpoint.ref}: evaluation"
    (folder / "report.html").write_text(page.html(title, blocks), encoding="utf-8")
    for block in blocks:
        if isinstance(block, page.Figure):
            (folder / block.file).write_text(block.svg, encoding="utf-8")


def headline(results: list[Result]) -> dict[str, object]:
    """Every score by "task metric", and what the tasks found beside."""
    return {
        "scores": {
            f"{score.task} {score.metric}": {
                key: value for key, value in asdict(score).items() if key not in {"task", "metric"}
            }
            for result in results
            for score in result.scores
        },
        "details": {result.task: result.details for result in results},
        "skipped": {result.task: result.skipped for result in results if result.skipped},
    }


def tell(made: Artifact, results: list[Result], seconds: float, reporter: Reporter) -> None:
    """The scores as a table, shares in percent."""
    rows = []
    for score in (score for result in results for score in result.scores):
        value, low, high, guess = (
            shown(score, number) for number in (score.value, score.low, score.high, score.baseline)
        )
        rows.append([score.task, score.metric, value, f"{low} – {high}", guess, f"{score.n:,}"])
    reporter.table(["task", "metric", "value", "95 % interval", "baseline", "n"], rows)
    reporter.line(f"Evaluated in {duration(seconds)}. Report: {made.file('report.html')}")


def shown(score: Score, number: float | None) -> str:
    """A number of a score: bits and Brier scores as they are, shares in percent."""
    if number is None:
        return ""
    return f"{number:.3f}" if "bits" in score.metric or score.metric == "brier" else f"{100 * number:.1f} %"


def pinned(file: TaskFile) -> TaskFile:
    """The file with its content's hash, so that changed questions are another recipe. Raises NotFound or UserError."""
    if not file.path.is_file():
        raise NotFound(f"there is no file {file.path}.")
    found = sha256(file.path)
    if file.sha256 not in (None, found):
        raise UserError(f"the content has SHA-256 {found}, not {file.sha256}.", where=str(file.path))
    return replace(file, sha256=found)


def curves(checkpoint: Artifact, workspace: Workspace) -> Iterator[Curve]:
    """The training curves of a checkpoint and, before it, of the checkpoints it was made from, as far as they are still here."""
    for source in checkpoint.manifest.inputs.values():
        if source["kind"] == "checkpoint":
            try:
                yield from curves(workspace.open(source["ref"], "checkpoint"), workspace)
            except (NotFound, ArtifactError):
                continue
    if checkpoint.has("metrics.jsonl"):
        lines = checkpoint.file("metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        validation = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
        if train:
            yield Curve(checkpoint.ref, train, validation)
