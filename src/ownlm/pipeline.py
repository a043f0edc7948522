"""Whole runs: every stage of one model's life, in order.

    demo    documents ─ tokenizer ─ pretrain ─ finetune ─ evaluate, of a made-up village, from a recipe
    build   the same on a folder of files; a budget of time or parameters becomes a recipe first

A recipe file has a table for each stage (docs/decisions/0003). Each stage finds what was finished before, so a run that
was stopped goes on where it was.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ownlm import device
from ownlm import recipe as recipes
from ownlm.artifact import Artifact, Workspace
from ownlm.catalog import Catalog
from ownlm.documents.collect import DocumentsRecipe, collect
from ownlm.errors import UserError
from ownlm.evaluate.stage import EvaluateRecipe, evaluate
from ownlm.report import Reporter, duration, size
from ownlm.tokens.train import TokenizerRecipe, train_tokenizer
from ownlm.train.samples import answers, continuations
from ownlm.train.stages import FinetuneRecipe, PretrainRecipe, finetune, pretrain

DEMO = "village-cpu.toml"


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


def run_stage(stage: str, path: Path, overrides: Sequence[str], workspace: Workspace, reporter: Reporter) -> Artifact:
    """The artifact of one stage of a recipe file, made now or found."""
    recipe = read_recipe(path, overrides)
    if getattr(recipe, stage) is None:
        raise UserError(f"the recipe has no [{stage}] table.", where=str(path))
    return _run(stage, getattr(recipe, stage), workspace, reporter)


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
}
