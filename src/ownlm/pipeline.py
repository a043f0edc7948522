"""Whole runs: every stage of one model's life, in order.

    demo    documents ─ tokenizer ─ pretrain ─ finetune ─ evaluate, of a made-up village, from a recipe
    build   the same on a folder of files; a budget of time or parameters becomes a recipe first

A recipe file has a table for each stage (docs/decisions/0003). Each stage finds what was finished before, so a run that
was stopped goes on where it was.
"""

import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ownlm import device
from ownlm import recipe as recipes
from ownlm.artifact import Artifact, Workspace, check_name
from ownlm.catalog import Catalog
from ownlm.documents.collect import DocumentsRecipe, FolderSource, collect
from ownlm.errors import UserError
from ownlm.evaluate.baselines import NGRAM_BYTES, XZ_BYTES
from ownlm.evaluate.stage import EvaluateRecipe, evaluate
from ownlm.release.quantize import Method, Precision, QuantizeRecipe, quantize, settings
from ownlm.report import Reporter, duration, size
from ownlm.storage import require_space, write_atomic
from ownlm.tokens.shards import TokensRecipe, tokenize
from ownlm.tokens.train import TokenizerRecipe, train_tokenizer
from ownlm.train.plan import Corpus, Plan, make_plan, record
from ownlm.train.samples import answers, continuations
from ownlm.train.stages import FinetuneRecipe, PretrainRecipe, finetune, pretrain

DEMO = "village-cpu.toml"
DEFAULT_BUDGET = "10m"
TUNING_SHARE = 0.15  # of the time for training, where there are conversations
# Of the evaluation: xz reads at most so many bytes and is the slowest part; for each byte of text that the baselines hold,
# the n-gram model's numbers of six bytes are sorted; the rest is the forward pass of one batch.
EVALUATION_S, EVALUATION_S_PER_MB = 5.0, 1.0
EVALUATION_BYTES, EVALUATION_BYTES_PER_BYTE = 100_000_000, 13
DONE = {"documents", "tokenizer", "encoding", "planning"}  # over before the plan is shown
NOT_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One run. The names of artifacts follow from `name` where a table doesn't give its own."""

    name: str  # of the model that comes out
    seed: int = 1  # of every table that doesn't set its own
    documents: DocumentsRecipe | None = None
    tokenizer: TokenizerRecipe | None = None
    pretrain: PretrainRecipe | None = None
    finetune: FinetuneRecipe | None = None
    evaluate: EvaluateRecipe | None = None
    quantize: QuantizeRecipe | None = None


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, names and seeds filled in, every table checked. Raises RecipeError with all faults."""
    data = recipes.load(path)
    for override in overrides:
        recipes.set_value(data, override)
    return recipes.validate(Recipe, fill_names(data), where=str(path))


def fill_names(data: dict[str, Any]) -> dict[str, Any]:
    """The same tables with the names, inputs and seeds that follow from the run's own."""
    name, seed = str(data.get("name", "")), data.get("seed", 1)
    implied: dict[str, dict[str, Any]] = {
        "documents": {"name": f"{name}-documents", "seed": seed},
        "tokenizer": {"name": f"{name}-tokenizer", "documents": f"{name}-documents"},
        "pretrain": {
            "name": f"{name}-base" if "finetune" in data else name,
            "documents": f"{name}-documents",
            "tokenizer": f"{name}-tokenizer",
            "seed": seed,
        },
        "finetune": {"name": name, "checkpoint": f"{name}-base", "documents": f"{name}-documents", "seed": seed},
        "evaluate": {"name": f"{name}-scores", "checkpoint": name, "documents": f"{name}-documents", "seed": seed},
        "quantize": {"name": f"{name}-quantized", "checkpoint": name, "seed": seed},
    }
    tables = {key: {**values, **data[key]} for key, values in implied.items() if isinstance(data.get(key), dict)}
    return {**data, **tables}


def demo(workspace: Workspace, reporter: Reporter, overrides: Sequence[str] = ()) -> dict[str, Artifact]:
    """Every stage of the village's recipe, from nothing to scores. Finished stages are found, a stopped one goes on."""
    began = time.monotonic()
    recipe = read_recipe(recipes_folder() / DEMO, overrides)
    reporter.line(
        f"{recipe.name}: from nothing to a chat model of a made-up village (seed {recipe.seed}). "
        "Ctrl-C saves; the same command goes on."
    )
    made = run_all(recipe, workspace, reporter)
    seconds, memory = time.monotonic() - began, device.peak_memory_bytes()
    reporter.event("done", name=recipe.name, seconds=seconds, peak_memory_bytes=memory)
    reporter.line(
        f"Done in {duration(seconds)}, peak memory {size(memory)}. What to try next:\n"
        f"  ownlm chat {recipe.name}                    ask it about the village\n"
        f"  ownlm serve {recipe.name}                   an OpenAI-compatible API and a chat page on http://127.0.0.1:8000\n"
        f"  ownlm show {recipe.name}                    what it is made of, back to the documents\n"
        f"  ownlm build FOLDER --name mine     the same on your own files"
    )
    return made


def build(
    folder: Path,
    *,
    workspace: Workspace,
    reporter: Reporter,
    name: str | None = None,
    budget: str | None = None,
    params: str | None = None,
    dry_run: bool = False,
) -> dict[str, Artifact]:
    """A model of the files in a folder, within a budget of time ("10m") or of parameters ("5m"); no budget: ten minutes.

    Where the folder holds conversations, the model is tuned on them. `dry_run` prints the plan and trains nothing.
    Raises UserError for a folder without usable text, or one too small for the budget.
    """
    seconds = None if budget is None and params is not None else parse_budget(budget or DEFAULT_BUDGET)
    wanted = None if params is None else parse_params(params)
    name = check_name(name or NOT_A_NAME.sub("-", folder.resolve().name).strip("-.") or "model")
    clock, made = Clock(), {}
    source = FolderSource(path=str(folder))
    made["documents"] = clock.timed(
        "documents",
        lambda: _run("documents", DocumentsRecipe(name=f"{name}-documents", source=source), workspace, reporter),
    )
    splits = made["documents"].facts["splits"]
    text_bytes = sum(int(split["bytes"]) for split in splits.values())
    tokenizer = TokenizerRecipe(
        name=f"{name}-tokenizer", documents=made["documents"].ref, vocab_size=vocab_size_for(text_bytes)
    )
    made["tokenizer"] = clock.timed("tokenizer", lambda: _run("tokenizer", tokenizer, workspace, reporter))
    chat = made["documents"].has("conversations.jsonl")
    base = f"{name}-base" if chat else name
    documents, vocabulary = made["documents"].ref, made["tokenizer"].ref
    tokens = clock.timed(
        "encoding",
        lambda: tokenize(
            TokensRecipe(name=f"{base}-tokens", documents=documents, tokenizer=vocabulary), workspace, reporter
        ),
    )
    plan = _planned(base, tokens, seconds, wanted, text_bytes, chat, clock, workspace, reporter, keep=not dry_run)
    reporter.table(["plan", ""], plan.rows())
    reporter.event("plan", **asdict(plan))
    if dry_run:
        return made
    require_space(workspace.root, plan.disk_bytes)
    made["pretrain"] = _run(
        "pretrain", plan.recipe(base, documents=documents, tokenizer=vocabulary), workspace, reporter
    )
    if chat:
        tuning = FinetuneRecipe(
            name=name,
            checkpoint=made["pretrain"].ref,
            documents=documents,
            document_share=0.3,
            batch_tokens=plan.batch_tokens,
            steps=max(10, round(TUNING_SHARE * plan.steps)),
        )
        made["finetune"] = _run("finetune", tuning, workspace, reporter)
    scores = EvaluateRecipe(name=f"{name}-scores", checkpoint=name, documents=documents)
    made["evaluate"] = _run("evaluate", scores, workspace, reporter)
    _compare(plan, made, workspace, reporter)
    _plan_file(workspace, base).unlink(missing_ok=True)
    reporter.line(
        f"What to try next:\n"
        f"  ownlm {'chat ' + name if chat else 'generate ' + name + ' TEXT max_tokens=100'}\n"
        f"  ownlm serve {name}\n"
        f"  ownlm show {name}"
    )
    return made


def vocab_size_for(text_bytes: int) -> int:
    """A vocabulary that the text can teach: 1,024 tokens for 0.25 MB, twice as many for four times the text, 16,384 at most."""
    return int(min(16_384, max(512, 2 ** round(10 + math.log(max(1, text_bytes) / 250_000, 4)))))


class Clock:
    """Seconds of each finished part of a run, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, part: str, work: Callable[[], Artifact]) -> Artifact:
        began = time.monotonic()
        result = work()
        self.seconds[part] = time.monotonic() - began
        return result


def _planned(
    name: str,
    tokens: Artifact,
    seconds: float | None,
    params: int | None,
    text_bytes: int,
    chat: bool,
    clock: Clock,
    workspace: Workspace,
    reporter: Reporter,
    *,
    keep: bool,
) -> Plan:
    """The plan of this build: that of a stopped run of the same text and budget, or a new one."""
    file = _plan_file(workspace, name)
    key = {"tokens": tokens.digest, "seconds": seconds, "params": params}
    if file.is_file():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] == key:
            reporter.line("Going on with the plan of the run that was stopped.")
            return recipes.validate(Plan, kept["plan"], where=str(file))
    splits = tokens.facts["splits"]
    corpus = Corpus(
        train_tokens=splits["train"]["tokens"],
        validation_tokens=splits["validation"]["tokens"],
        vocab_size=tokens.facts["vocab_size"],
    )
    reserved = {"evaluation": EVALUATION_S + EVALUATION_S_PER_MB * min(text_bytes, XZ_BYTES) / 1e6}
    if chat and seconds is not None:
        reserved["tuning"] = TUNING_SHARE * max(0.0, seconds - sum(clock.seconds.values()))
    plan = make_plan(
        corpus,
        workspace=workspace,
        reporter=reporter,
        seconds=seconds,
        params=params,
        spent=clock.seconds,
        reserved=reserved,
        reserved_bytes=EVALUATION_BYTES + EVALUATION_BYTES_PER_BYTE * min(text_bytes, NGRAM_BYTES),
    )
    if chat and seconds is None:
        plan = replace(plan, seconds={**plan.seconds, "tuning": TUNING_SHARE * plan.seconds["training"]})
    if keep:
        workspace.runs.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"key": key, "plan": asdict(plan)}, indent=1))
    return plan


def _plan_file(workspace: Workspace, name: str) -> Path:
    return workspace.runs / f"{name}.plan.json"


def _compare(plan: Plan, made: dict[str, Artifact], workspace: Workspace, reporter: Reporter) -> None:
    """Show predicted beside actual, and keep the record that corrects the next prediction."""
    actual = {
        **plan.seconds,  # those that were over when the plan was made
        "training": made["pretrain"].facts["stage_seconds"],
        "evaluation": made["evaluate"].facts["seconds"],
    }
    if "finetune" in made:
        actual["tuning"] = made["finetune"].facts["stage_seconds"]
    total_s, memory = sum(actual.values()), device.peak_memory_bytes()
    record(workspace, plan, training_s=actual["training"], total_s=total_s, peak_memory_bytes=memory)
    rows = [(part, plan.seconds[part], seconds) for part, seconds in actual.items()]
    reporter.table(
        ["", "predicted", "actual", "off by"],
        [
            *(
                [part, duration(a), duration(b), f"{b / max(a, 0.1) - 1:+.0%}"]
                for part, a, b in rows
                if part not in DONE
            ),
            ["time in all", duration(plan.total_s), duration(total_s), f"{total_s / plan.total_s - 1:+.0%}"],
            ["peak memory", size(plan.peak_memory_bytes), size(memory), f"{memory / plan.peak_memory_bytes - 1:+.0%}"],
        ],
    )
    scores, found = made["evaluate"].facts["scores"], made["evaluate"].facts["details"]["bits_per_byte"]
    bits = scores["bits_per_byte bits per byte"]["value"]
    reporter.line(
        f"Bits per byte on held-out documents: {bits:.3f}; an order-5 byte n-gram model {found['ngram']:.3f}, "
        f"xz after the training text {found['xz']:.3f}, xz alone {found['xz_alone']:.3f}."
    )
    reporter.event(
        "build",
        predicted_s=plan.total_s,
        actual_s=total_s,
        predicted_bytes=plan.peak_memory_bytes,
        actual_bytes=memory,
        bits_per_byte=bits,
        **{name: found[name] for name in ("ngram", "xz", "xz_alone")},
    )


def run_stage(stage: str, path: Path, overrides: Sequence[str], workspace: Workspace, reporter: Reporter) -> Artifact:
    """The artifact of one stage of a recipe file, made now or found."""
    recipe = read_recipe(path, overrides)
    if getattr(recipe, stage) is None:
        raise UserError(f"the recipe has no [{stage}] table.", where=str(path))
    return _run(stage, getattr(recipe, stage), workspace, reporter)


def quantized(
    ref: str | Path,
    *,
    to: Precision,
    method: Method | None,
    documents: str | Path | None,
    name: str | None,
    workspace: Workspace,
    reporter: Reporter,
) -> Artifact:
    """The checkpoint of a reference in integers, made now or found."""
    recipe = settings(ref, to=to, method=method, documents=documents, name=name, workspace=workspace)
    return _run("quantize", recipe, workspace, reporter)


def run_all(recipe: Recipe, workspace: Workspace, reporter: Reporter) -> dict[str, Artifact]:
    """The artifacts of every stage that the recipe has, in order."""
    made: dict[str, Artifact] = {}
    for number, stage in enumerate(stages := [name for name in STAGES if getattr(recipe, name) is not None], start=1):
        reporter.line(f"\n[{number}/{len(stages)}] {stage}")
        made[stage] = _run(stage, getattr(recipe, stage), workspace, reporter)
    return made


def recipes_folder() -> Path:
    """Where the recipes that come with ownlm are: inside an installed package, or in the checkout."""
    installed = Path(__file__).parent / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_path(text: str) -> Path:
    """A file, or the name of a recipe that comes with ownlm."""
    shipped = recipes_folder() / f"{text.removesuffix('.toml')}.toml"
    return shipped if not Path(text).exists() and shipped.exists() else Path(text)


def parse_budget(text: str) -> float:
    """Seconds: parse_budget("10m") == 600. Raises UserError."""
    return _parse(text, {"s": 1.0, "m": 60.0, "h": 3600.0}, "a budget of time", "90s, 10m or 2h")


def parse_params(text: str) -> int:
    """A count: parse_params("1.5m") == 1_500_000. Raises UserError."""
    return int(_parse(text, {"k": 1e3, "m": 1e6, "b": 1e9}, "a number of parameters", "500k, 5m or 1b"))


def _parse(text: str, units: dict[str, float], what: str, examples: str) -> float:
    try:
        value = float(text[:-1]) * units[text[-1:].lower()]
    except (ValueError, KeyError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"{text!r} is not {what}.", cure=f"Write {examples}.")
    return value


def _run(stage: str, recipe: Any, workspace: Workspace, reporter: Reporter) -> Artifact:
    """Run one stage and record it in the catalog."""
    catalog = Catalog(workspace.root)
    try:
        with catalog.run(stage, recipe.name) as run:
            artifact = STAGES[stage](recipe, workspace, reporter)
            run.artifact, run.digest = artifact.ref, artifact.digest
    finally:
        catalog.close()
    return artifact


def _pretrain(recipe: PretrainRecipe, workspace: Workspace, reporter: Reporter) -> Artifact:
    return pretrain(recipe, workspace, reporter, sample=continuations(workspace.open(recipe.documents, "documents")))


def _finetune(recipe: FinetuneRecipe, workspace: Workspace, reporter: Reporter) -> Artifact:
    return finetune(recipe, workspace, reporter, sample=answers(workspace.open(recipe.documents, "documents")))


STAGES: dict[str, Callable[[Any, Workspace, Reporter], Artifact]] = {
    "documents": collect,
    "tokenizer": train_tokenizer,
    "pretrain": _pretrain,
    "finetune": _finetune,
    "evaluate": evaluate,
    "quantize": quantize,
}
